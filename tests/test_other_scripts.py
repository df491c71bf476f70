"""What `test_end_to_end.py` checks for the first script, in short for the others: a run killed, resumed; bad input."""

import json
import random
import signal
import time

import pytest
from test_end_to_end import FEW, Fork, assert_same_checkpoint, finish, phases_seen, rows_of

import parl_diffusion_iql
import parl_diffusion_rlpd
import parl_flow_calql
import parl_transformer_calql

TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 600 --threads 1 --eval-episodes 3 --log-every 10 "
    "--checkpoint-seconds 0 --num-cloning-steps 40 --num-online-episodes 4 --num-online-evals 2 "
    "--cloning-batch-size 32 --critic-hidden 16 16 --batch-size 16 --num-bins 16 --num-samples 4 --num-keep 2 "
    "--num-gradient-steps 2 --distill-ratio 0.3 --utd 0.3"
).split()
DIFFUSION = "--policy-hidden 16 --policy-blocks 1".split()
OFFLINE = "--num-offline-steps 40 --num-offline-evals 2".split()
SCRIPTS = {
    parl_transformer_calql: "--policy-width 16 --policy-layers 1 --policy-heads 2 --policy-bins 32".split() + OFFLINE,
    parl_flow_calql: DIFFUSION + OFFLINE,
    parl_diffusion_iql: DIFFUSION + OFFLINE + ["--distill-every", "10"],
    parl_diffusion_rlpd: DIFFUSION + ["--num-warmup-episodes", "3", "--utd", "1.3"],
}  # fmt: skip
VARIANTS = [
    (parl_transformer_calql, "--critic-loss mse --distill-selection sample"),
    (parl_flow_calql, "--flow-steps 1 --chunk 2 --policy-dropout 0.0 --critic-loss mse"),
    (parl_diffusion_iql, "--extraction idql"),
    (parl_diffusion_iql, "--critic-loss mse --refresh-every 0 --no-distill-data-actions --num-keep 1"),
    (parl_diffusion_iql, "--num-offline-steps 0 --num-offline-evals 0 --distill-ratio 0"),
    (parl_diffusion_rlpd, "--critic-loss mse --target-data-actions --sample-backup --distill-selection greedy"),
    (parl_diffusion_rlpd, "--num-keep 1 --num-gradient-steps 0 --distill-ratio 0 --mixing-ratio 1"),
]


def named(script):
    return script.__name__


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(script, tmp_path):
    flags = TOY + SCRIPTS[script]
    script.main([*flags, "--runs", str(tmp_path / "whole")])
    (reference,) = (tmp_path / "whole").iterdir()
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "summary.png"):
        assert (reference / name).stat().st_size > 0
    assert json.loads((reference / "config.json").read_text())["script"] == script.__name__ in reference.name

    process, folder = Fork(script, *flags, "--runs", str(tmp_path / "killed")), None
    for phase in ("cloning", "offline", "online"):
        deadline = time.monotonic() + 120
        while folder is None or phase not in phases_seen(folder):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
            folder = next((tmp_path / "killed").iterdir(), None) if (tmp_path / "killed").is_dir() else None
        time.sleep(random.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = Fork(script, "--resume", str(folder))
    code, output = finish(process)
    assert code == 0, output
    assert rows_of(folder) == rows_of(reference)
    assert_same_checkpoint(folder, reference)


def flags_or_name(value):
    return value if isinstance(value, str) else named(value)


@pytest.mark.parametrize(("script", "flags"), VARIANTS, ids=flags_or_name)
def test_every_variant_runs(script, flags, tmp_path):
    short = "--num-cloning-steps 2 --num-online-episodes 1".split()
    script.main([*TOY, *SCRIPTS[script], *short, *flags.split(), "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert phases_seen(folder) >= {"cloning", "online"}


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id pointmaze-mediun-v0", ("pointmaze-medium-v0",)),
        ("--num-keep 20 --num-samples 16", ("--num-keep 20", "--num-samples (16)")),
        ("--discount 1.0", ("--discount",)),
        ("--batch-size 0", ("--batch-size",)),
        ("--matmul-precision medium --num-gradient-steps 1", ("--matmul-precision medium", "--num-gradient-steps 0")),
        ("--preset nonsense", ("nonsense", "antmaze")),
        ("--dataset-path /nowhere.npz", ("/nowhere.npz",)),
        ("--resume /nowhere", ("/nowhere",)),
    ],
)
def test_bad_flags(script, flags, words, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        script.main([*FEW, *flags.split(), "--runs", str(tmp_path)])
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        (parl_transformer_calql, "--policy-heads 3", "--policy-heads"),
        (parl_transformer_calql, "--policy-bins 1", "--policy-bins"),
        (parl_flow_calql, "--flow-steps 0", "--flow-steps"),
        (parl_diffusion_iql, "--expectile 1.5", "--expectile"),
        (parl_diffusion_iql, "--distill-every 0", "--distill-every"),
        (parl_diffusion_rlpd, "--target-subset 11", "--target-subset"),
        (parl_diffusion_rlpd, "--num-warmup-episodes 0", "--num-warmup-episodes"),
    ],
    ids=flags_or_name,
)
def test_flags_of_their_own_are_checked(script, flags, word, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        script.main([*TOY, *flags.split(), "--runs", str(tmp_path)])
    assert word in str(stopped.value) and not list(tmp_path.iterdir())


def test_a_run_of_another_script_is_refused(tmp_path):
    parl_diffusion_iql.main([*TOY, *SCRIPTS[parl_diffusion_iql], "--num-online-episodes", "0", "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    with pytest.raises(SystemExit, match="another script"):
        parl_diffusion_rlpd.main(["--resume", str(folder)])
