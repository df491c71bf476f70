"""benchmarks/distilling.py: four ways from one start, the critic as it was; tables and pictures; what it refuses."""

import csv

import pytest
import torch

import parl_diffusion_calql as script
from benchmarks import distilling

TOY = (
    "--env-id pointmaze-umaze-v0 --dataset-size 300 --threads 1 --eval-episodes 2 --num-cloning-steps 5 "
    "--num-offline-steps 5 --num-offline-evals 1 --num-online-episodes 0 --policy-hidden 8 --policy-blocks 1 "
    "--cloning-batch-size 8 --critic-hidden 8 --batch-size 8 --num-bins 8 --num-samples 2 --num-keep 2"
).split()


def test_four_ways_from_one_start(tmp_path, monkeypatch):
    script.main([*TOY, "--runs", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    seen, distill = [], script.distill

    def watch(policy, average, optimizer, critic, buffer, num_updates, greedy, args):
        before = {name: value.clone() for name, value in critic.state_dict().items()}
        result = distill(policy, average, optimizer, critic, buffer, num_updates, greedy, args)
        assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
        assert len(buffer) > buffer.num_offline and optimizer.param_groups[0]["lr"] == args.distill_lr
        seen.append((args.distill_data_actions, args.distill_mixed, num_updates, greedy))
        return result

    monkeypatch.setattr(script, "distill", watch)
    rows = distilling.measure(distilling.Options(run=str(folder), updates=4, every=2, collect=1, episodes=2))
    assert seen == [(a, m, 2, True) for a in (1, 0) for m in (0, 1) for _ in range(2)]
    assert [row["updates"] for row in rows] == [0, 2, 4] * 4 and len({row["way"] for row in rows}) == 4
    starts = [(row["spread"], row["q"]) for row in rows if row["updates"] == 0]
    assert len(set(starts)) <= 4 and all(start[0] > 0 for start in starts)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    distilling.draw(distilling.Options(draw=str(tmp_path / "a.png"), csv=(str(tmp_path / "a.csv"),)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="not the folder of a run"):
        distilling.measure(distilling.Options(run=str(tmp_path)))
