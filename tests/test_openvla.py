"""OpenVLA in plain PyTorch: parity with the published code, sampling, action tokens, LoRA, the policy."""

import functools
import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn as nn

import parl_openvla_real as script
from benchmarks.vla import checkpoint as files
from benchmarks.vla.robot import unnormalize

INSTALL = "pip install -r requirements-openvla.txt"
pytest.importorskip("peft", reason=f"adapters are peft's: {INSTALL}")
pytest.importorskip("safetensors", reason=f"weights are safetensors: {INSTALL}")

DATA = pathlib.Path(__file__).parent / "data" / "openvla"
PUBLISHED = script.Sizes(
    dino=(32, 3, 2, 128), siglip=(24, 4, 2, 89), llama=(16, 2, 2, 40), projector=224
)  # the reference's; all else as openvla-7b
SMALL = script.Sizes(28, (16, 3, 2, 24), (12, 3, 2, 20), (16, 2, 2, 24), 32, 400, empty_token=2)
STATISTICS = {
    "q01": np.array([-0.028, -0.042, -0.026, -0.08, -0.093, -0.208, 0.0]),
    "q99": np.array([0.028, 0.041, 0.04, 0.081, 0.077, 0.203, 1.0]),
    "mask": np.array([True] * 6 + [False]),
}
CPU = torch.device("cpu")


@functools.cache
def vectors():
    return {name: torch.tensor(array) for name, array in np.load(DATA / "outputs.npz").items()}


@functools.cache
def published_model():
    """The reference's weights, by the way that a user's checkpoint takes."""
    with torch.device("meta"):
        model = script.OpenVLA(PUBLISHED)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    model.load_state_dict(files.read_weights(DATA, shapes, CPU), assign=True)
    return model.requires_grad_(False)


def small_model(seed=0, scale=0.15):
    """Random weights large enough that every input matters."""
    torch.manual_seed(seed)
    model = script.OpenVLA(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def small_policy(model=None, instruction="put the pot down", **options):
    tokenize = files.load_tokenizer(None, SMALL.vocabulary, SMALL.last_action - 256 - 3)
    return script.VLAPolicy(model or small_model(), tokenize, instruction, **options)


def frames(num, size=SMALL.image, seed=0):
    return torch.randint(256, (num, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def draws(policy, images, num=3, seed=5):
    return policy.sample(images, num, torch.Generator().manual_seed(seed))


def adapted(rank=4, moved=0.1, model=None):
    """A policy with adapters; moved: what is added to them, so that they do something."""
    policy = small_policy(model)
    script.add_lora(policy.model, rank)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in script.adapters(policy.model).values():
            parameter.add_(moved * torch.randn_like(parameter))
    files.train_only(policy.model, script.adapters(policy.model))
    return policy


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


# --- PARITY WITH THE PUBLISHED CODE ---


def test_vision_features_are_the_published_ones():
    v, model = vectors(), published_model()
    with torch.no_grad():
        features = model.vision_features(v["pixel_values"].float())
        close(features, v["vision_features"], 2e-5)
        close(model.projector(features), v["projected"], 2e-5)


def test_logits_and_loss_are_the_published_ones():
    v, model = vectors(), published_model()
    pixels = v["pixel_values"].float()
    logits = model.logits(pixels, v["input_ids"], 9)
    assert logits.shape == (2, 9, 32064) and logits.dtype == torch.float32
    close(logits[..., ::4], v["logits_every_4th"], 1e-4)
    policy = script.VLAPolicy(model, lambda text: v["prompt_ids"].tolist(), "anything")
    close(policy.loss(pixels, v["actions"]), v["loss"], 1e-5)
    close(model.logits(pixels, v["input_ids"], 2), logits[:, -2:], 1e-5)


def test_the_published_greedy_tokens_and_actions():
    v, model = vectors(), published_model()
    pixels = v["pixel_values"].float()
    tokens = model.sample_tokens(pixels, v["prompt_ids"], 2, lambda logits: logits.argmax(-1))
    expected = v["greedy_tokens"][:, None].expand(-1, 2, -1)
    assert torch.equal(tokens + PUBLISHED.last_action - script.NUM_BINS, expected)
    policy = script.VLAPolicy(model, lambda text: v["prompt_ids"].tolist(), "anything", top_k=1)
    actions = policy.sample(pixels, 3)
    assert actions.shape == (2, 3, 7) and actions.dtype == torch.float32
    for one in actions.unbind(1):
        np.testing.assert_allclose(unnormalize(one.numpy(), STATISTICS), v["greedy_actions"], atol=1e-8)


def test_the_prompt_is_the_published_one():
    """The instruction in lower case; the token of a lone space once, whether or not the tokenizer writes it."""
    v, texts = vectors(), []
    for ids in (v["prompt_ids"].tolist(), v["prompt_ids"][:-1].tolist()):
        tokenize = lambda text, ids=ids: texts.append(text) or ids  # noqa: E731
        policy = script.VLAPolicy(published_model(), tokenize, " Put Eggplant in pot ")
        assert torch.equal(policy.prompt, v["prompt_ids"])
    assert set(texts) == {"In: What action should the robot take to put eggplant in pot?\nOut:"}


def test_images_become_the_published_pixels():
    """[0, 1], then DINOv2's and SigLIP's own mean and deviation, in this order of channels."""
    images, model = frames(2), small_model()
    unit = images.numpy().astype(np.float64) / 255
    mean, std = (np.array(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.tensor(np.concatenate([(unit - mean) / std, (unit - 0.5) / 0.5], 1), dtype=torch.float32)
    with torch.no_grad():
        close(model.vision_features(images), model.vision_features(pixels), 1e-5)
        assert (model.vision_features(pixels[:, [3, 4, 5, 0, 1, 2]]) - model.vision_features(pixels)).abs().max() > 0.1


def test_the_full_model_has_the_published_size():
    """Parameters that the forward pass uses, adapted layers and adapters of openvla-7b."""
    with torch.device("meta"):
        model = script.OpenVLA(script.Sizes())
    assert sum(p.numel() for p in model.parameters()) == 7_498_156_704
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    towers = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    assert shapes[f"{towers[0]}.blocks.22.attn.qkv.weight"] == (3072, 1024)
    assert shapes[f"{towers[1]}.blocks.25.mlp.fc1.weight"] == (4304, 1152)
    assert not {f"{towers[0]}.blocks.23.norm1.weight", f"{towers[1]}.blocks.26.norm1.weight"} & shapes.keys()
    assert shapes["language_model.model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    script.add_lora(model, 32)
    new = script.adapters(model)
    assert len({name.split(".lora_")[0] for name in new}) == 426
    assert sum(p.numel() for p in new.values()) == 109_126_400


# --- WHAT THE POLICY SEES ---


def test_image_and_instruction_change_logits_and_actions():
    """Current transformers, given the published code, cut the prompt to one token, and told nobody."""
    policy, images = small_policy(top_k=1), frames(6)
    other = small_policy(policy.model, "put the pot on the stove", top_k=1)
    assert not torch.equal(policy.prompt, other.prompt)

    def logits(policy, images):
        tokens = torch.cat([policy.prompt.expand(len(images), -1), torch.full((len(images), 7), 150)], 1)
        with torch.no_grad():
            return policy.model.logits(images, tokens, 8)

    base = logits(policy, images)
    for changed in (logits(policy, frames(6, seed=1)), logits(other, images)):
        assert ((changed - base).abs().amax((1, 2)) > 0.05).all()
    actions = policy.sample(images, 1)
    assert len(actions.unique(dim=0)) > 1
    assert not torch.equal(policy.sample(frames(6, seed=1), 1), actions)
    assert not torch.equal(other.sample(images, 1), actions)
    assert torch.equal(policy.sample(images, 1), actions)


def test_each_part_of_the_image_matters():
    """A change of one patch of 14 x 14 pixels changes the logits, by a way of its own for each patch."""
    policy, images = small_policy(), frames(1).repeat(5, 1, 1, 1)
    for i, (row, column) in enumerate(((0, 0), (0, 14), (14, 0), (14, 14)), 1):
        images[i, :, row : row + 14, column : column + 14] = 255 - images[i, :, row : row + 14, column : column + 14]
    with torch.no_grad():
        logits = policy.model.logits(images, policy.prompt.expand(5, -1), 1)[:, 0]
    distances = torch.cdist(logits, logits) + 100 * torch.eye(5)
    assert distances.min() > 0.05


def test_the_future_is_not_seen():
    policy, images = small_policy(), frames(1)
    tokens = torch.cat([policy.prompt, torch.arange(150, 157)])[None]
    with torch.no_grad():
        before = policy.model.logits(images, tokens, 8)
        for i in range(7):
            other = tokens.clone()
            other[0, -7 + i] += 40
            changed = (policy.model.logits(images, other, 8) - before).abs().amax(-1)[0] > 1e-3
            assert changed.tolist() == [j > i for j in range(8)]


# --- SAMPLING ---


def recorded_sample(model, images, prompt, num_samples, seed=7):
    """Arbitrary tokens and the log-probabilities among action tokens that each was drawn from: (B, n, 7, 256)."""
    seen, generator = [], torch.Generator().manual_seed(seed)

    def pick(logits):
        assert logits.shape == (len(images), num_samples, 256)
        seen.append(logits.log_softmax(-1))
        return torch.randint(256, logits.shape[:2], generator=generator)

    return model.sample_tokens(images, prompt, num_samples, pick), torch.stack(seen, 2)


@pytest.mark.parametrize("which", ["published", "small"])
def test_many_samples_at_once_have_the_distribution_of_each_alone(which):
    """Samples share the prefix's keys and values and see nothing of each other."""
    if which == "published":
        model, images, prompt = published_model(), vectors()["pixel_values"].float(), vectors()["prompt_ids"]
    else:
        model, images, prompt = small_model(), frames(3), small_policy().prompt
    first = model.sizes.last_action - 256
    tokens, seen = recorded_sample(model, images, prompt, 4)
    assert tokens.shape == (len(images), 4, 7) and len(tokens.flatten(0, 1).unique(dim=0)) == 4 * len(images)
    for b in range(len(images)):
        for i in range(4):
            whole = torch.cat([prompt, tokens[b, i] + first])[None]
            with torch.no_grad():
                alone = model.logits(images[b : b + 1], whole, 8)[0, :-1, first : first + 256].log_softmax(-1)
            close(seen[b, i], alone, 2e-5)


def test_the_prefix_is_encoded_once_per_state_and_a_token_once():
    model, images, rows = small_model(), frames(3), {}
    prompt = small_policy(model).prompt
    for name in ("vision_backbone.featurizer.blocks.0.mlp.fc1", "language_model.model.layers.1.mlp.down_proj"):
        count = lambda module, args, out, name=name: rows.setdefault(name, []).append(out[..., 0].numel())  # noqa: E731
        model.get_submodule(name).register_forward_hook(count)
    recorded_sample(model, images, prompt, 5)
    vision, language = rows.values()
    assert vision == [3 * (4 + 5)] and language == [3 * (4 + len(prompt))] + 6 * [3 * 5]


def test_samples_follow_the_top_k_softmax():
    """Temperature 1 among the k likeliest action tokens: frequencies of the first token, chi-square."""
    policy, copies, n = small_policy(top_k=6), 100, 40
    logits = []
    policy.model.sample_tokens(frames(1), policy.prompt, 1, lambda x: logits.append(x[0, 0]) or x.argmax(-1))
    top, index = logits[0].topk(6)
    probabilities = top.softmax(-1).double()
    actions = draws(policy, frames(1).expand(copies, -1, -1, -1), n)[..., 0]
    values = script.action_values()[index]
    counts = (actions.flatten()[:, None] == values).sum(0)
    assert counts.sum() == copies * n, "a token that is not among the likeliest"
    expected = probabilities * copies * n
    assert expected.min() > 5 and ((counts - expected) ** 2 / expected).sum() < 25  # 5 degrees of freedom, p = 1e-4


def test_samples_are_the_generators():
    policy, images = small_policy(), frames(2)
    state = torch.get_rng_state()
    one, two, other = draws(policy, images), draws(policy, images), draws(policy, images, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (2, 3, 7) and not one.requires_grad
    assert set(one.unique().tolist()) <= set(script.action_values().tolist())
    assert not torch.equal(one[0, 0], one[0, 1])


# --- ACTION TOKENS ---


def test_actions_have_the_published_tokens():
    v = vectors()
    assert torch.equal(script.encode_actions(v["actions"], PUBLISHED), v["action_tokens"])
    assert torch.equal(v["input_ids"][:, -8:-1], v["action_tokens"])
    actions = torch.cat([torch.rand(2000) * 2.4 - 1.2, torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 513)])
    for kind in (torch.float32, torch.float64):
        ours = script.encode_actions(actions.to(kind), PUBLISHED).numpy()
        theirs = 32000 - np.digitize(np.clip(actions.to(kind).numpy(), -1, 1), np.linspace(-1, 1, 256))
        np.testing.assert_array_equal(ours, theirs)


def test_edges_and_what_lies_beyond():
    ids = script.encode_actions(torch.tensor([1.0, 1.5, 1e9, -1.0, -1.5, -1e9]), PUBLISHED)
    assert ids.tolist() == [31744] * 3 + [31999] * 3


def test_all_256_tokens_go_there_and_back():
    """A token's action has this token again; but for +1's, which stands for the last centre, as published."""
    tokens = torch.arange(31744, 32000)
    actions = script.action_values()
    centers = (np.linspace(-1, 1, 256)[:-1] + np.linspace(-1, 1, 256)[1:]) / 2
    published = centers[np.clip(32000 - tokens.numpy() - 1, 0, 254)]
    np.testing.assert_allclose(actions, published, atol=1e-7)
    assert actions.dtype == torch.float32
    again = script.encode_actions(actions, PUBLISHED)
    assert torch.equal(again[1:], tokens[1:]) and again[0] == 31745
    assert torch.equal(actions[again - 31744], actions)
    any_actions = torch.rand(50, 7) * 2 - 1
    error = actions[script.encode_actions(any_actions, PUBLISHED) - 31744] - any_actions
    assert error.abs().max() <= 1 / 255 + 1e-6


# --- THE LOSS ---


def test_the_loss_is_the_mean_cross_entropy_of_eight_tokens():
    """Against log-softmax by hand, over the whole vocabulary; the end of the sequence counts."""
    policy, images = small_policy(), frames(3)
    actions = torch.rand(3, 7) * 2 - 1
    ids = script.encode_actions(actions, SMALL)
    total = 0.0
    for b in range(3):
        sequence = [*policy.prompt.tolist(), *ids[b].tolist(), 2]
        with torch.no_grad():
            log_p = policy.model.logits(images[b : b + 1], torch.tensor([sequence]), 9)[0].log_softmax(-1)
        total -= sum(log_p[i, sequence[-8 + i]].item() for i in range(8))
    assert policy.loss(images, actions).item() == pytest.approx(total / 24, rel=1e-5)


def test_a_uniform_policy_has_the_loss_of_its_vocabulary():
    policy = small_policy()
    nn.init.zeros_(policy.model.language_model["lm_head"].weight)
    assert policy.loss(frames(2), torch.rand(2, 7)).item() == pytest.approx(math.log(400), rel=1e-6)


def test_checkpointing_changes_no_gradient():
    """On a GPU activations are computed anew in the backward pass."""
    model, images = small_model(), frames(2)
    tokens = torch.randint(400, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.logits(images, tokens, 3, checkpointed=checkpointed).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.parameters()))
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


# --- LORA ---


def test_adapters_change_nothing_at_first():
    policy, images = small_policy(), frames(2)
    actions = torch.rand(2, 7)
    before, loss = draws(policy, images), policy.loss(images, actions)
    script.add_lora(policy.model, 4)
    assert torch.equal(draws(policy, images), before) and torch.equal(policy.loss(images, actions), loss)


def test_every_layer_that_is_used_is_adapted_and_no_other():
    """All linear and convolutional ones that the forward pass calls, whatever peft takes `all-linear` to be."""
    model, used = small_model(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda module, args, out, name=name: used.add(name))
    small_policy(model).loss(frames(1), torch.zeros(1, 7))
    script.add_lora(model, 4)
    assert {name.split(".lora_")[0] for name in script.adapters(model)} == used
    layers = 2 * 4 + 2 * 4 + 2 * 7 + 2 + 3 + 1  # two towers of two blocks, Llama's two, patches, projector, head
    assert len(used) == layers and len(script.adapters(model)) == 2 * layers
    for name, parameter in script.adapters(model).items():
        assert 4 in parameter.shape and (parameter.abs().max() == 0) == (".lora_B." in name)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(script.adapters(model))


def test_only_adapters_are_trained_and_all_of_them():
    policy, images = adapted(moved=0.02), frames(4)
    base = {name: p.clone() for name, p in policy.model.named_parameters() if ".lora_" not in name}
    before = {name: p.detach().clone() for name, p in script.adapters(policy.model).items()}
    optimizer = torch.optim.Adam(script.adapters(policy.model).values(), 1e-3)
    actions = torch.rand(4, 7) * 2 - 1
    losses = [script.supervised_step(policy, optimizer, images, actions).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, (base | before)[name]) == (name in base), name


def test_the_scale_of_an_adapter_is_alpha_over_rank():
    """W x + (16 / r) B A x."""
    policy = adapted(rank=2)
    layer = policy.model.get_submodule("projector.fc2")
    parts = dict(layer.named_parameters())
    A, B = (next(p for name, p in parts.items() if f"lora_{which}" in name) for which in "AB")
    base = {name.split(".")[-1]: p for name, p in parts.items() if "lora_" not in name}
    x = torch.randn(5, A.shape[1])
    expected = x @ base["weight"].T + base["bias"] + 16 / 2 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_float32_on_a_bfloat16_model():
    model = small_model().to(torch.bfloat16)
    policy = adapted(moved=0.02, model=model)
    kinds = {(".lora_" in name, p.dtype) for name, p in policy.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    actions = torch.rand(2, 7)
    optimizer = torch.optim.Adam(script.adapters(policy.model).values(), 1e-3)
    losses = [script.supervised_step(policy, optimizer, frames(2), actions) for _ in range(8)]
    assert losses[0].dtype == torch.float32 and losses[-1] < losses[0]
    assert draws(policy, frames(2)).dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in script.adapters(policy.model).values())


def test_saved_adapters_give_the_same_samples(tmp_path):
    policy, images = adapted(), frames(3)
    state = files.TrainedPart(policy.model).state_dict()
    assert state.keys() == script.adapters(policy.model).keys()
    torch.save(state, tmp_path / "adapters.pt")
    other = adapted(moved=0.0)
    assert not torch.equal(draws(other, images), draws(policy, images))
    saved = torch.load(tmp_path / "adapters.pt", weights_only=True)
    files.TrainedPart(other.model).load_state_dict(saved)
    assert torch.equal(draws(other, images), draws(policy, images))
    assert other.version() == policy.version()


def test_merged_weights_are_a_checkpoint_with_the_same_logits(tmp_path):
    """Without adapters, under the published names; and the model that was merged stays as it was."""
    policy, images = adapted(moved=0.05), frames(2)
    tokens = policy.prompt.expand(2, -1)
    with torch.no_grad():
        before = policy.model.logits(images, tokens, 3)
        merged = files.merged_weights(policy.model)
        assert torch.equal(policy.model.logits(images, tokens, 3), before)
    assert merged.keys() == script.OpenVLA(SMALL).state_dict().keys()
    files.write_checkpoint(tmp_path / "out", policy.model, files.TINY_STATISTICS)
    changed, statistics = files.read_config(tmp_path / "out")
    assert script.Sizes(**changed) == SMALL and statistics == files.TINY_STATISTICS
    plain = script.OpenVLA(SMALL)
    shapes = {name: tuple(p.shape) for name, p in plain.state_dict().items()}
    with torch.no_grad():
        assert (plain.logits(images, tokens, 3) - before).abs().max() > 0.1
        plain.load_state_dict(files.read_weights(tmp_path / "out", shapes, CPU))
        close(plain.logits(images, tokens, 3), before, 2e-5)
    unmerged = dict(policy.model.named_parameters())
    name = "vision_backbone.featurizer.patch_embed.proj"  # the convolution, too
    assert not torch.equal(merged[f"{name}.weight"], unmerged[f"{name}.base_layer.weight"])
    assert torch.equal(merged[f"{name}.bias"], unmerged[f"{name}.base_layer.bias"])


def test_the_version_names_what_samples_depend_on():
    """Instruction, adapters, the base model, how many tokens are drawn among; and nothing else."""
    versions = [adapted().version(), small_policy().version(), small_policy(small_model(seed=1)).version()]
    assert adapted().version() == versions[0]
    policy = adapted()
    draws(policy, frames(1))
    assert policy.version() == versions[0]
    policy.set_instruction("put the pot on the stove")
    versions.append(policy.version())
    versions.append(small_policy(top_k=7).version())
    for number in (0, -1):
        policy = adapted()
        parameter = list(script.adapters(policy.model).values())[number]
        parameter.data.view(-1)[0] += 1e-3
        versions.append(policy.version())
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("instruction", ["", "   ", "\n"])
def test_an_empty_instruction_is_refused(instruction):
    policy = small_policy()
    for refused in (lambda: small_policy(policy.model, instruction), lambda: policy.set_instruction(instruction)):
        with pytest.raises(SystemExit) as stopped:
            refused()
        message = str(stopped.value)
        assert message.startswith("error: ") and "\n" not in message and "--instruction" in message
