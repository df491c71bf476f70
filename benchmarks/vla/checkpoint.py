"""Reading and writing an OpenVLA checkpoint: its folder or hub id, config, statistics, tokenizer and safetensors.

Whatever does not fit ends in one line before anything long begins. Weights are safetensors only, nothing is unpickled.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from benchmarks.harness.cli import fail
from benchmarks.harness.runs import write_atomically

# Statistics of BridgeData V2, as openvla-7b has them: what normalised actions of -1 and 1 are on the robot
BRIDGE = {
    "q01": [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972,
            -0.09288699507713317, -0.20718276381492615, 0.0],
    "q99": [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528,
            0.07792850524187081, 0.20382574498653397, 1.0],
    "mask": [True, True, True, True, True, True, False],
}  # fmt: skip
TINY_STATISTICS = {"bridge_orig": {"action": BRIDGE}}
BOS = 1
WORDS = "In: What action should the robot take to"  # how every prompt begins, and its ids in Llama 2's vocabulary:
WORD_IDS = [BOS, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]
FULL_VOCABULARY = 32064
# Weights of the published checkpoint that the forward pass does not touch
UNUSED = re.compile(r"vision_backbone\.(fused_)?featurizer\.(norm\.|attn_pool\.|blocks\.\d+\.)")
LARGE = 1e9  # parameters from which on a model is not for a CPU


def checkpoint_folder(checkpoint: str, files: str) -> pathlib.Path:
    """The checkpoint on this machine: a folder's path, or an id of the Hugging Face hub, of which these files (a
    pattern) are downloaded.
    """
    path = pathlib.Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    parts = checkpoint.split("/")
    if len(parts) != 2 or not all(part.strip(".") for part in parts):
        fail(f"--checkpoint {checkpoint}: no such folder, and neither an id of the hub (owner/name) nor `tiny`")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fail(f"--checkpoint {checkpoint} is no folder here; to download it: pip install huggingface_hub")
    try:
        return pathlib.Path(snapshot_download(checkpoint, allow_patterns=[files]))
    except Exception as error:  # of the hub's many kinds
        why = (str(error).strip() or repr(error)).splitlines()[0]
        fail(f"--checkpoint {checkpoint} could not be downloaded ({why})")


def read_config(folder: pathlib.Path) -> tuple[dict, dict]:
    """What config.json says of the networks' sizes (none: those of openvla-7b), and action statistics by robot."""
    try:
        config = json.loads((folder / "config.json").read_text())
        own = folder / "dataset_statistics.json"  # of a fine-tuned model
        statistics = config.get("norm_stats", {}) | (json.loads(own.read_text()) if own.is_file() else {})
        eps = config.get("text_config", {}).get("rms_norm_eps")
        sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in config.get("parl_sizes", {}).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the latter two: of another form
        fail(f"{folder} is no OpenVLA checkpoint: its config cannot be read ({error})")
    return ({} if eps is None else {"rms_eps": eps}) | sizes, statistics


class Opened(NamedTuple):
    """What is known of a checkpoint before anything heavy is read or downloaded."""

    sizes: object  # of the networks
    checkpoint: str  # folder or hub id; empty: random weights
    tokenize: object  # text -> ids
    statistics: dict  # of the robot's actions: q01, q99, mask


def cloned_folder(args) -> pathlib.Path | None:
    """Where a resumed run with `--checkpoint tiny` has its cloned model, if it has come so far."""
    folder = pathlib.Path(args.resume, "cloned")
    done = args.resume and args.checkpoint == "tiny" and (folder / "config.json").is_file()
    return folder if done else None


def open_checkpoint(args, sizes_class, tiny, folder: pathlib.Path | None = None) -> Opened:
    """Open args.checkpoint, or a folder that is named. sizes_class, tiny: a script's sizes, and those of `tiny`."""
    checkpoint = str(folder or "") if args.checkpoint == "tiny" else args.checkpoint
    if not checkpoint:
        sizes, statistics = tiny, TINY_STATISTICS
    else:
        folder = checkpoint_folder(checkpoint, "*.json")
        changed, statistics = read_config(folder)
        sizes = sizes_class(**changed)
        if args.preset == "widowx" and sizes.vocabulary >= FULL_VOCABULARY:
            fail(f"--preset widowx is sized for a tiny model, and {checkpoint} is none: add --preset default")
    tokenize = load_tokenizer(folder, sizes.vocabulary, sizes.last_action - 256 - 3)
    return Opened(sizes, checkpoint, tokenize, action_statistics(statistics, args.unnorm_key))


def action_statistics(statistics: dict, key: str) -> dict[str, np.ndarray]:
    """q01, q99 and mask, each (7,), of one robot."""
    if key not in statistics:
        known = ", ".join(sorted(statistics)) or "none"
        fail(f"--unnorm-key {key}: the checkpoint has no action statistics for it; it has {known}")
    action = statistics[key].get("action", {})
    found = {name: np.asarray(action.get(name, [True] * 7 if name == "mask" else [])) for name in BRIDGE}
    if any(array.shape != (7,) for array in found.values()):
        fail(f"--unnorm-key {key}: its statistics are not q01 and q99 of 7 action dimensions")
    return found


def load_tokenizer(folder: pathlib.Path | None, vocabulary: int, num_words: int):
    """A function from text to token ids, BOS first: the checkpoint's tokenizer.json.

    Of a model with fewer words than Llama 2 (`tiny`) a word's id is its hash, one of num_words.
    """
    if folder is None or vocabulary < FULL_VOCABULARY:
        return lambda text: [BOS] + [3 + zlib.crc32(word.encode()) % num_words for word in text.split()]
    path = folder / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        fail(f"{path} cannot be read ({str(error).splitlines()[0]})")
    ids = tokenizer.encode(WORDS).ids
    if ids[:1] != [BOS]:
        fail(f"{path} puts no BOS before a text; without it OpenVLA does not understand what follows")
    if (last := max(tokenizer.get_vocab().values())) >= vocabulary:
        fail(f"{path} is of another vocabulary than the model's: its ids go to {last}, the model's to {vocabulary - 1}")
    if ids != WORD_IDS:
        fail(f"{path} is of another vocabulary than Llama 2's: it writes {WORDS!r} as {ids}, not {WORD_IDS}")
    return lambda text: tokenizer.encode(text).ids


def check_memory(num_parameters: int, device: torch.device) -> None:
    """Refuse a full-size model where it has no room. What is needed is an estimate, above the 20 GB once measured on an
    H100 with random weights (benchmarks/README.md).

    Weights in bfloat16, adapters of 110 million parameters with gradient and two moments in float32, 6 GB of the rest.
    """
    if num_parameters < LARGE:
        return
    needed = (2 * num_parameters + 4 * 4 * 110e6 + 6e9) / 2**30
    size = f"a model of {num_parameters / 1e9:.1f} billion parameters needs a GPU with about {needed:.0f} GiB"
    if device.type != "cuda":
        fail(f"{size}, this is a CPU; try --checkpoint tiny")
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if total < needed:
        fail(f"{size}, this one has {total:.0f}")


def read_weights(folder: pathlib.Path, shapes: dict[str, tuple], device) -> dict[str, torch.Tensor]:
    """The named tensors of all *.safetensors in a folder: bfloat16 on a GPU, float32 on a CPU.

    Names and shapes are compared before anything is read. What UNUSED names may be there as well.
    """
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        fail(f"{folder} has no *.safetensors; weights in other formats are not read: those can run code")
    try:
        files = [safe_open(path, "pt") for path in paths]
    except (SafetensorError, OSError) as error:
        fail(f"the weights in {folder} cannot be read ({error})")
    found = {name: (tuple(file.get_slice(name).get_shape()), file) for file in files for name in file.keys()}
    faults = {
        "missing": shapes.keys() - found.keys(),
        "surplus": {name for name in found.keys() - shapes.keys() if not UNUSED.match(name)},
        "of another shape": {name for name in shapes.keys() & found.keys() if found[name][0] != tuple(shapes[name])},
    }
    told = [f"{len(names)} {what} ({min(names)} first)" for what, names in faults.items() if names]
    if told:
        fail(f"{folder} holds another model: of its tensors {', '.join(told)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {name: found[name][1].get_tensor(name).to(device, dtype) for name in shapes}


def load_model(model_class, opened: Opened, device: torch.device) -> nn.Module:
    """`model_class(sizes)` with the checkpoint's weights, or random ones; the same random numbers follow either way."""
    with torch.device("meta" if opened.checkpoint else "cpu"):
        model = model_class(opened.sizes)
    torch.manual_seed(torch.initial_seed())  # a resumed run, which reads what it cloned, draws the same adapters
    if not opened.checkpoint:
        return model.to(device)
    check_memory(sum(p.numel() for p in model.parameters()), device)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    folder = checkpoint_folder(opened.checkpoint, "*.safetensors")
    model.load_state_dict(read_weights(folder, shapes, device), assign=True)
    return model


def train_only(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Let these be what is trained of a model, and therefore what a run's checkpoint holds.

    Adapters that are not among them are passed by: untrained ones change nothing and cost a third of the time.
    """
    for module in model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(any(".lora_" in name for name in parameters))
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_()


class TrainedPart:
    """What of a model is trained, to be saved with a run."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in state.items():
            parameters[name].copy_(value)


def fingerprint(settings, *parameters: torch.Tensor) -> str:
    """16 hexadecimal digits that change with any of these."""
    total = hashlib.sha256(repr(settings).encode())
    for parameter in parameters:
        total.update(parameter.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under their published names, W + (alpha / r) B A where there is an adapter; the model stays as it is.

    Merging into bfloat16 rounds away part of a small update: what acts and what is trained stays unmerged.
    """
    weights = {}
    for name, module in model.named_modules():
        own = {f"{name}.{key}".removeprefix("."): p.detach() for key, p in module.named_parameters(recurse=False)}
        weights |= {key.replace(".base_layer", ""): p for key, p in own.items() if ".lora_" not in key}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight("default")
    return weights


def write_checkpoint(folder: pathlib.Path, model: nn.Module, statistics: dict) -> None:
    """A folder that `--checkpoint` reads: the weights, adapters merged into them, and config.json with their sizes.

    Of a model with Llama's vocabulary it takes its tokenizer.json as well, which is not written.
    """
    from safetensors.torch import save

    folder.mkdir(exist_ok=True)
    config = json.dumps({"parl_sizes": dataclasses.asdict(model.sizes), "norm_stats": statistics})
    content = save({name: tensor.cpu().contiguous() for name, tensor in merged_weights(model).items()})
    write_atomically(folder / "model.safetensors", lambda file: file.write(content))
    write_atomically(folder / "config.json", lambda file: file.write(config.encode()))
