"""Each loss against F.cross_entropy, which one a run has, and packed documents against the same documents alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dayzero.config import Method, Train
from dayzero.console import log
from dayzero.engine import loss_choice
from dayzero.engine.chunks import IGNORE, token_cross_entropy
from dayzero.engine.fused_losses import plain_head
from dayzero.engine.loss import CausalLMWithLoss, LossOptions, decoder_returns, known_positions, loss_of_logits
from dayzero.engine.loss_choice import LOSSES, PREFERENCE, choose_loss
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.structure import find_decoder, find_layers
from dayzero.errors import ConfigError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

_SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
# models whose logits are more than head(hidden): scaled (cohere, granite) or capped (gemma2)
SHAPES = {
    **ARCHITECTURES,
    "cohere": {"model_type": "cohere", **_SMALL, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **_SMALL, "logits_scaling": 4.0},
    "gemma2": {"model_type": "gemma2", **_SMALL, "head_dim": 8, "final_logit_softcapping": 5.0},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4},
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = dict(SHAPES[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def batch(supervised: float = 0.4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 17))
    labels = torch.where(torch.rand(3, 17) < supervised, torch.randint(0, VOCAB_SIZE, (3, 17)), IGNORE)
    return input_ids, labels, torch.arange(17).expand(3, 17)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_chunked_loss_equals_cross_entropy_in_value_and_gradient(name: str, chunk_size: int) -> None:
    model = tiny(name)
    input_ids, labels, position_ids = batch()
    logits = model(input_ids=input_ids, position_ids=position_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected / 7).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss = CausalLMWithLoss(model, options=LossOptions(chunk_size=chunk_size))(input_ids, labels, position_ids)
    (loss / 7).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("loss", ["chunked", "cross_entropy"])
def test_z_loss_in_value_and_gradient(loss: str, name: str) -> None:
    model = tiny(name)
    input_ids, labels, position_ids = batch()
    logits = model(input_ids=input_ids, position_ids=position_ids).logits
    supervised = labels != IGNORE
    plain = F.cross_entropy(logits[supervised], labels[supervised], reduction="sum")
    expected = plain + 0.1 * (logits[supervised].exp().sum(-1).log() ** 2).sum()
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    options = LossOptions(chunk_size=4, z_loss=0.1)
    module = CausalLMWithLoss(model, loss=LOSSES[loss], options=options)
    found = module.train()(input_ids, labels, position_ids)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-5, atol=1e-5)
    # a validation loss is that of the tokens alone
    torch.testing.assert_close(module.eval()(input_ids, labels, position_ids), plain, rtol=1e-5, atol=0)


def test_cut_cross_entropy_in_value_and_gradient() -> None:
    """Its compiled variant, which is what runs without a GPU."""
    pytest.importorskip("cut_cross_entropy")
    pytest.importorskip("triton")
    model, rows = tiny("qwen3"), batch()
    found = []
    for loss in ("cross_entropy", "cut_cross_entropy"):
        model.zero_grad()
        value = CausalLMWithLoss(model, loss=LOSSES[loss])(*rows)
        (value / 7).backward()
        found.append((value, {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-5)


def on_meta(name: str, **fields: object) -> PreTrainedModel:
    fields = {**SHAPES[name], **fields}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_heads_that_do_more_than_multiply_are_seen() -> None:
    plain = {name for name in SHAPES if plain_head(on_meta(name)) is not None}
    assert SHAPES.keys() - plain == {"big_bird", "cohere", "granite", "gemma2"}
    assert plain_head(on_meta("gemma2", final_logit_softcapping=None)) is not None


@pytest.mark.parametrize("trained", ["all", "decoder", "head", "nothing"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_chunked_gradients_reach_what_is_trained(name: str, trained: str) -> None:
    model = tiny(name)
    if name == "qwen3":  # the other's head is the embedding
        model.lm_head.weight.requires_grad_(trained in ("all", "head"))
    for parameter in find_decoder(model).parameters():
        parameter.requires_grad_(trained in ("all", "decoder"))
    found = []
    for loss in ("cross_entropy", "chunked"):
        model.zero_grad()
        value = CausalLMWithLoss(model, loss=LOSSES[loss], options=LossOptions(chunk_size=5))(*batch())
        if value.requires_grad:
            value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    own = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found[1]) == 1 + len(own)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_chunked_gradients_in_bfloat16_are_no_worse_than_autograd_s(name: str) -> None:
    """Against float64, for all weights together, under a scale that bfloat16 has not (as 1/tokens)."""
    exact = tiny(name).double()
    (CausalLMWithLoss(exact, loss=LOSSES["cross_entropy"])(*batch(1.0)) / 771).backward()
    errors = {}
    for loss in ("cross_entropy", "chunked"):
        model = tiny(name).bfloat16()
        (CausalLMWithLoss(model, loss=LOSSES[loss], options=LossOptions(chunk_size=13))(*batch(1.0)) / 771).backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        errors[loss] = sum((p.grad.double() - q.grad).square().sum().item() for p, q in pairs) ** 0.5
    assert errors["chunked"] < 1.1 * errors["cross_entropy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_in_pieces_that_fit_the_cache(dtype: torch.dtype, z_loss: float) -> None:
    """Many such pieces, the last one shorter, with positions that have no label; logits far from one another."""
    torch.manual_seed(0)
    positions, vocabulary = 11, 2**17 + 3  # three positions a piece
    logits = (20 * torch.randn(positions, vocabulary)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (positions,))
    labels[[0, 5]] = IGNORE
    expected = loss_of_logits(logits, labels, z_loss)
    (gradient,) = torch.autograd.grad(expected / 7, logits)
    found = token_cross_entropy(logits, labels, z_loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(torch.autograd.grad(found / 7, logits)[0], gradient, **close)


MESHES: dict[str, dict[str, object]] = {"one": {}, "tp": {"tp": 2}, "pp": {"pp": 2}}


@pytest.mark.parametrize(
    ("name", "mesh", "cuda", "expected"),
    [
        ("llama", "one", False, "chunked"),
        ("llama", "tp", False, "loss_parallel"),
        ("gemma2", "tp", True, "chunked"),
        ("llama", "pp", True, "chunked"),
    ],
)
def test_auto_takes_what_can_be_had_and_says_why(name: str, mesh: str, cuda: bool, expected: str) -> None:
    size = 1 if mesh == "one" else 2
    dims = ParallelDims(strategy="fsdp2", world_size=size, **MESHES[mesh])
    choice = choose_loss(on_meta(name), Train(), dims, cuda=cuda)
    assert choice.name == expected
    assert choice.function is LOSSES[expected]
    assert choice.reason


@pytest.mark.parametrize(
    ("packages", "z_loss", "expected"),
    [
        (["liger_kernel", "cut_cross_entropy", "triton"], 0.0, "liger_fused"),
        (["cut_cross_entropy", "triton"], 0.0, "cut_cross_entropy"),
        (["cut_cross_entropy", "triton"], 0.1, "chunked"),
        ([], 0.0, "chunked"),
    ],
)
def test_on_a_gpu_auto_goes_by_the_packages_there(
    packages: list[str], z_loss: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which packages are installed is made up: the choice alone is looked at."""
    monkeypatch.setattr(loss_choice, "find_spec", lambda name: name if name in packages else None)
    train = Train.model_validate({"precision": "bf16", "z_loss": z_loss or None})
    dims = ParallelDims(strategy="fsdp2", world_size=1)
    choice = choose_loss(on_meta("llama"), train, dims, cuda=True)
    assert choice.name == expected
    passed_over = PREFERENCE[: PREFERENCE.index(expected)]
    assert [reason.split()[0] for reason in choice.reason.split("; ")] == list(passed_over)


def test_the_log_says_which_loss_and_why(caplog: pytest.LogCaptureFixture) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["llama"], random_weights=True)
    with caplog.at_level("INFO", logger=log.name):
        ParallelModel(
            source=source, method=Method(name="full"), train=Train(max_steps=1),
            dims=ParallelDims(strategy="none", world_size=1), seed=0, device=torch.device("cpu"),
        )  # fmt: skip
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("loss: ")]
    assert said.startswith("loss: chunked (loss_parallel splits the vocabulary over tp ranks, but parallelism.tp is 1")
    assert "liger_fused needs a GPU, and none is here" in said


@pytest.mark.parametrize(
    ("loss", "name", "mesh", "cuda", "said"),
    [
        ("liger_fused", "llama", "one", False, "needs a GPU, and none is here"),
        ("loss_parallel", "llama", "one", False, "parallelism.tp is 1"),
        ("loss_parallel", "granite", "tp", False, "takes logits to be head.hidden states., but GraniteForCausalLM"),
        ("cut_cross_entropy", "llama", "pp", True, "with pp 2 only the last stage has"),
    ],
)
def test_a_loss_that_cannot_be_had_is_refused_in_one_line(
    loss: str, name: str, mesh: str, cuda: bool, said: str
) -> None:
    dims = ParallelDims(strategy="fsdp2", world_size=1 if mesh == "one" else 2, **MESHES[mesh])
    train = Train.model_validate({"loss": loss})
    with pytest.raises(ConfigError, match=f"^train.loss {loss}: .*{said}.*: use auto") as refused:
        choose_loss(on_meta(name), train, dims, cuda=cuda)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("loss", ["chunked", "cross_entropy"])
def test_a_batch_without_labels_gives_a_finite_zero_with_gradients(loss: str) -> None:
    model = tiny("llama")
    input_ids, labels, position_ids = batch()
    value = CausalLMWithLoss(model, loss=LOSSES[loss])(input_ids, torch.full_like(labels, IGNORE), position_ids)
    value.backward()
    assert value.item() == 0.0
    for name, parameter in model.named_parameters():  # every rank must reduce every gradient
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter.grad)), name


def test_only_label_positions_pass_the_head_and_only_once() -> None:
    model = tiny("qwen3")
    input_ids, labels, position_ids = batch()
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[:-1].numel()))
    CausalLMWithLoss(model, options=LossOptions(chunk_size=4))(input_ids, labels, position_ids).backward()
    assert sum(widths) == (labels != IGNORE).sum()
    assert max(widths) <= 4


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_documents_do_not_see_one_another(name: str) -> None:
    model = tiny(name)
    torch.manual_seed(2)
    first, second = torch.randint(0, VOCAB_SIZE, (1, 9)), torch.randint(0, VOCAB_SIZE, (1, 7))
    module = CausalLMWithLoss(model)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).unsqueeze(0)
    with torch.no_grad():
        packed = module(torch.cat([first, second], 1), None, positions)
        alone = [module(d, None, torch.arange(d.shape[1]).unsqueeze(0)) for d in (first, second)]
        edited = module(torch.cat([(first + 1) % VOCAB_SIZE, second], 1), None, positions)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)
    assert torch.equal(edited[:, 9:], packed[:, 9:])
    assert not torch.equal(edited[:, :9], packed[:, :9])


def test_structure_is_found_without_names() -> None:
    for name in SHAPES.keys() - {"opt", "big_bird"}:  # whose decoder is inside another module
        model = tiny(name)
        assert find_decoder(model) is model.base_model
        assert len(find_layers(model)) == len(list(find_layers(model)))
        assert any(layers is find_layers(model) for layers in model.base_model.children())


def test_a_head_that_reaches_past_the_outer_decoder() -> None:
    """OPT calls the decoder inside its decoder; taking the place of the outer one would change nothing."""
    model = tiny("opt")
    assert find_decoder(model) is model.model.decoder
    assert "forward" not in vars(model.model)
    says = "the model does not call its OPTModel: use train.loss: cross_entropy"
    with pytest.raises(ValueError, match=says), decoder_returns(model.model, None):
        model(input_ids=batch()[0])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no list of layers: .* choose another model\.source"):
        find_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("supervised", [1.0, 0.4, 0.0])
def test_label_positions_that_are_known_change_nothing(supervised: float) -> None:
    model = tiny("llama")
    input_ids, labels, position_ids = batch(supervised)
    known = known_positions(labels)
    assert (known is None) == (supervised == 0)
    found = []
    for positions in (None, known):
        model.zero_grad()
        loss = CausalLMWithLoss(model)(input_ids, labels, position_ids, positions=positions)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert found[0][1]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
