"""One loss curve: every strategy and number of ranks against a plain loop in one process.

The label counts of the rows are ragged, so a mean taken on each rank, or on each micro-batch, would fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.engine.parallel_dims import SCHEDULES

from tests.distributed.cases import (
    CASES,
    FP8,
    FP8_CURVES,
    MOE,
    PP,
    REPRESENTATIVE,
    VARIANTS,
    WITHOUT_PLAN,
    Results,
    job,
    moe,
    setting,
    uneven,
    variant,
)
from tests.distributed.frozen_weights import check_frozen
from tests.distributed.launch import run_ranks
from tests.distributed.loading import check_loading, loading_jobs
from tests.distributed.optimizers import OPTIMIZERS
from tests.distributed.split_vocabulary import check_split_vocabulary

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """World size 1: the references, and the engine's own single process in several settings."""
    jobs = [job("reference", *case, folder) for case in CASES + WITHOUT_PLAN]
    jobs += [job("train", *case, folder, strategy="fsdp2", local_batch_size=8) for case in CASES + WITHOUT_PLAN]
    jobs += [variant("reference", label, folder) for label in VARIANTS]
    jobs += [variant("train", label, folder, strategy="fsdp2", local_batch_size=8) for label in VARIANTS]
    jobs.append(uneven("reference", folder))
    jobs += [moe("reference", *case, folder) for case in MOE]
    for size in (2, 1):
        jobs.append(job("train", "llama", "full", "padded", folder, strategy="none", local_batch_size=size))
    jobs.append(job("train", "llama", "full", "padded", folder, strategy="none", local_batch_size=8))
    for more in (
        {"loss": "cross_entropy"},
        {"loss_chunk_size": 3},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "every_3"},
        {"attention": "sdpa"},
        {"cpu_offload": True},
        {"compile": True},
        {"num_data_workers": 2},
    ):
        jobs.append(setting(folder, **more))
    for model in ("llama", "qwen3", "mamba"):
        for precision in ("fp32", "bf16"):
            train = {"precision": precision}
            jobs.append(job("leak", model, "full", "packed", folder, strategy="fsdp2", train=train))
    jobs.append(job("frozen", "llama", "lora", "packed", folder, strategy="fsdp2"))
    jobs.append(job("optimizers", "llama", "full", "packed", folder, tp=1))
    return run_ranks(1, jobs, folder / "one")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    jobs = [job("train", *case, folder, strategy="fsdp2", local_batch_size=2) for case in REPRESENTATIVE]
    jobs += [
        job("train", model, method, "padded", folder, strategy="ddp", local_batch_size=2, dp_replicate=2)
        for model, method in (("llama", "full"), ("qwen3", "lora"))
    ]
    jobs += [
        job("train", "qwen3", "full", "packed", folder, strategy="fsdp2", local_batch_size=2, tp=2),
        job("train", "llama", "lora", "padded", folder, strategy="fsdp2", local_batch_size=4, tp=2),
        job("train", "qwen3", "lora", "padded", folder, strategy="fsdp2", tp=2, sequence_parallel=True),
        job("train", "llama", "full", "packed", folder, strategy="fsdp2", tp=2, sequence_parallel=True),
        job("train", "llama", "full", "packed", folder, strategy="fsdp2", cp=2, cp_method="allgather"),
        job("train", "qwen3", "lora", "padded", folder, strategy="fsdp2", cp=2, cp_method="allgather"),
        job("train", "qwen3", "full", "packed", folder, strategy="fsdp2", cp=2, cp_method="ulysses"),
        # with selective: trying torch's kernel must not be recorded as a part of the first layer
        job("train", "llama", "lora", "packed", folder, strategy="fsdp2", cp=2, cp_method="ring",
            train={"activation_checkpointing": "selective"}),
    ]  # fmt: skip
    jobs += [
        job("train", "llama", "full", "packed", folder, **PP, pp_schedule="1f1b"),
        job("train", "qwen3", "lora", "padded", folder, **PP, pp_schedule="1f1b", train={"loss": "cross_entropy"}),
        job("train", "llama", "full", "padded", folder, **PP, pp_schedule="interleaved"),
        job("train", "qwen3", "lora", "packed", folder, **PP, pp_schedule="interleaved", local_batch_size=1),
        job("train", "llama", "full", "packed", folder, **PP, pp_schedule="zero_bubble", local_batch_size=1),
        job("train", "qwen3", "lora", "padded", folder, **PP, pp_schedule="zero_bubble",
            train={"activation_checkpointing": "full"}),
    ]  # fmt: skip
    jobs.append(variant("reduced_early", "whole", folder, strategy="fsdp2", local_batch_size=1))
    jobs.append(uneven("train", folder, strategy="fsdp2"))
    jobs.append(uneven("train", folder, **PP, pp_schedule="zero_bubble"))
    jobs += [moe("train", *case, folder, strategy="fsdp2", ep=2) for case in MOE]
    jobs += [moe("train", *case, folder, strategy="fsdp2") for case in MOE[::3]]
    bf16 = {"strategy": "fsdp2", "train": {"precision": "bf16", "activation_checkpointing": "full"}}
    jobs += [
        job("bf16_logits", "llama", "full", "packed", folder, **bf16),
        job("bf16_logits", "qwen3", "lora", "packed", folder, **bf16),
        job("bf16_logits", "qwen3", "qlora", "packed", folder, **bf16),
        job("bf16_logits", "qwen3", "lora", "padded", folder, **bf16, tp=2),
        job("bf16_logits", "llama", "full", "padded", folder, **bf16, cp=2, cp_method="ring"),
        job("bf16_logits", "llama", "full", "packed", folder, **bf16, pp=2, pp_schedule="zero_bubble"),
        job("bf16_logits", "llama", "full", "packed", folder, strategy="fsdp2", train={"precision": "bf16_pure"}),
        *(job("bf16_logits", *case, "packed", folder, strategy="fsdp2", train=t) for case, t in FP8),
        job("leak", "llama", "full", "packed", folder, **PP, pp_schedule="interleaved"),
        *(job("same_shape_again", "llama", "full", "packed", folder, **PP, pp_schedule=s) for s in SCHEDULES),
    ]
    jobs += [
        job("frozen", "qwen3", "lora", "padded", folder, strategy="fsdp2"),
        job("frozen", "llama", "lora", "padded", folder, strategy="fsdp2", tp=2),
        job("frozen", "mixtral", "lora", "packed", folder, strategy="fsdp2", dp_replicate=2),
    ]
    jobs += [job("train", *case, folder, strategy="fsdp2", tp=2) for case in WITHOUT_PLAN]
    jobs += [variant("train", label, folder, strategy="fsdp2", local_batch_size=2) for label in VARIANTS]
    jobs += [
        variant("train", label, folder, strategy="fsdp2", local_batch_size=4, tp=2)
        for label in ("whole_tied", "z_loss", "frozen", "kd")
    ]
    jobs.append(variant("train", "kd", folder, strategy="ddp", local_batch_size=2, dp_replicate=2))
    jobs.append(
        variant("train", "z_loss", folder, strategy="fsdp2", local_batch_size=8, cp=2, train={"loss_chunk_size": 5})
    )
    jobs.append(variant("train", "kd", folder, strategy="fsdp2", local_batch_size=8, cp=2))
    jobs += [variant("train", label, folder, **PP, pp_schedule="1f1b") for label in ("whole_tied", "z_loss", "ema")]
    jobs.append(job("optimizers", "llama", "full", "packed", folder, tp=1))
    jobs.append(job("split_vocabulary", "llama", "full", "packed", folder))
    jobs += [job("train", *case, folder, strategy="fsdp2", train=train) for case, train in FP8_CURVES]
    for more in ({"cpu_offload": True}, {"precision": "bf16_pure"}, {"activation_checkpointing": "selective"}):
        jobs.append(job("train", "qwen3", "full", "packed", folder, strategy="fsdp2", local_batch_size=2, train=more))
    return run_ranks(2, jobs + loading_jobs(folder, 2), folder / "two")


@pytest.fixture(scope="module")
def four(folder: Path) -> Results:
    jobs = [
        job("train", "llama", "full", "padded", folder, strategy="fsdp2", local_batch_size=2),
        job("train", "qwen3", "full", "padded", folder, strategy="ddp", local_batch_size=1, dp_replicate=4),
        job("train", "llama", "lora", "packed", folder, strategy="fsdp2", local_batch_size=2, dp_replicate=2),
    ]
    jobs += [
        job("train", "qwen3", "full", "padded", folder, strategy="fsdp2", local_batch_size=2, tp=2),
        job("train", "llama", "lora", "packed", folder, strategy="fsdp2", tp=2, sequence_parallel=True),
        job("train", "qwen3", "full", "packed", folder, strategy="fsdp2", cp=2, cp_method="ring"),
        job("train", "llama", "lora", "packed", folder, strategy="fsdp2", cp=4, cp_method="ulysses"),
        job("train", "llama", "full", "padded", folder, **PP, pp_schedule="1f1b"),
        job("train", "qwen3", "lora", "packed", folder, **PP, dp_replicate=2, pp_schedule="interleaved"),
        job("train", "llama", "full", "packed", folder, **PP, tp=2, pp_schedule="zero_bubble"),
        job("train", "llama", "full", "packed", folder, **PP, pp_schedule="1f1b", cp=2, cp_method="ring",
            train={"activation_checkpointing": "full"}),
    ]  # fmt: skip
    jobs.append(uneven("train", folder, strategy="fsdp2", cp=2, cp_method="ring"))
    jobs.append(uneven("train", folder, strategy="fsdp2", dp_replicate=2))
    jobs += [moe("train", *case, folder, strategy="fsdp2", ep=2) for case in MOE[::3]]
    jobs.append(moe("train", *MOE[0], folder, strategy="fsdp2", cp=2, ep=4))
    jobs.append(moe("train", *MOE[1], folder, strategy="fsdp2", dp_replicate=2, ep=2))
    jobs.append(moe("train", *MOE[2], folder, strategy="fsdp2", tp=2, sequence_parallel=True, ep=2))
    jobs += [job("optimizers", "llama", "full", "packed", folder, tp=tp) for tp in (1, 2)]
    jobs.append(job("split_vocabulary", "llama", "full", "packed", folder))
    return run_ranks(4, jobs + loading_jobs(folder, 4), folder / "four")


@pytest.fixture(scope="module")
def rest(folder: Path) -> tuple[Results, Results, Results]:
    """On 1, 2 and 4 ranks what `make test` leaves to `make test-full`: others like it are in the fixtures above."""
    ddp: dict[str, Any] = {"strategy": "ddp", "local_batch_size": 2, "dp_replicate": 2}
    tp: dict[str, Any] = {"strategy": "fsdp2", "local_batch_size": 4, "tp": 2}
    others = [case for case in CASES if case not in REPRESENTATIVE]
    one = [setting(folder, compile=True, activation_checkpointing="selective")]
    two = [job("train", *case, folder, strategy="fsdp2", local_batch_size=2) for case in others]
    two += [job("train", *case, "padded", folder, **ddp) for case in (("llama", "lora"), ("qwen3", "full"))]
    two += [variant("train", label, folder, **tp) for label in ("rslora", "whole")]
    two.append(variant("train", "dora", folder, **PP, pp_schedule="1f1b"))
    four = [job("train", "qwen3", "lora", "packed", folder, strategy="fsdp2", local_batch_size=1)]
    ranks = {1: one, 2: two, 4: four}
    found = [run_ranks(size, jobs, folder / f"rest-{size}") for size, jobs in ranks.items()]
    return found[0], found[1], found[2]


def low_precision(name: str) -> bool:
    return "bf16_pure" in name or "fp8" in name


def check(results: Results, one: Results, expected: int) -> None:
    checked = 0
    for name, got in results.items():
        run, model, method, rows, *_ = name.split("-")
        if run != "train" or rows == "uneven" or (model, method, rows) in MOE or low_precision(name):
            continue
        want = one[f"reference-{model}-{method}-{rows}"]
        assert len(got["losses"]) == 10
        torch.testing.assert_close(got["losses"], want["losses"], rtol=1e-4, atol=0)
        torch.testing.assert_close(got["grad_norms"], want["grad_norms"], rtol=1e-4, atol=0)
        assert got["weights"].keys() == want["weights"].keys()
        for key, tensor in want["weights"].items():
            torch.testing.assert_close(got["weights"][key], tensor, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["kls"], want["kls"], rtol=1e-4, atol=0)
        for key, tensor in want["averages"].items():
            torch.testing.assert_close(got["averages"][key], tensor, rtol=1e-4, atol=1e-5)
        assert got["spread"] == 0.0, name
        checked += 1
    assert checked == expected


def test_one_process_equals_the_plain_loop(one: Results) -> None:
    check(one, one, len(CASES) + len(WITHOUT_PLAN) + len(VARIANTS) + 12)


def test_two_ranks_equal_the_plain_loop(two: Results, one: Results) -> None:
    check(two, one, len(REPRESENTATIVE) + len(WITHOUT_PLAN) + len(VARIANTS) + 28)


def test_four_ranks_equal_the_plain_loop(four: Results, one: Results) -> None:
    check(four, one, 11)


@pytest.mark.full
def test_the_other_meshes_equal_the_plain_loop(rest: tuple[Results, Results, Results], one: Results) -> None:
    for results, expected in zip(rest, (1, 9, 1), strict=True):
        check(results, one, expected)
        check_initial_weights(results, one)


def test_uneven_data_ends_with_a_short_step(one: Results, two: Results, four: Results) -> None:
    (want,) = (got for name, got in one.items() if name.startswith("reference-llama-full-uneven"))
    found = [got for r in (two, four) for name, got in r.items() if name.startswith("train-llama-full-uneven")]
    assert len(found) == 4
    for got in found:
        assert len(got["losses"]) == 5
        torch.testing.assert_close(got["losses"], want["losses"], rtol=1e-4, atol=0)
        torch.testing.assert_close(got["grad_norms"], want["grad_norms"], rtol=1e-4, atol=0)


def check_moe(results: Results, one: Results, expected: int) -> None:
    """As `check`, but 2e-4: which experts a token takes changes where two of them score nearly the same."""
    checked = 0
    for name, got in results.items():
        run, model, method, rows, *sizes = name.split("-")
        if run != "train" or (model, method, rows) not in MOE:
            continue
        want = one[f"reference-{model}-{method}-{rows}"]
        assert len(got["losses"]) == len(want["losses"]) == 10
        for key in ("losses", "grad_norms", "router_losses"):
            torch.testing.assert_close(got[key], want[key], rtol=2e-4, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert bool(got["router_losses"]) == (model == "mixtral")
        assert got["weights"].keys() == want["weights"].keys()
        for key, tensor in want["weights"].items():
            assert torch.equal(got["before"][key], want["before"][key]), (name, key)
            torch.testing.assert_close(got["weights"][key], tensor, rtol=2e-4, atol=2e-4)
        moved = {k for k, t in got["weights"].items() if "experts" in k and not torch.equal(t, got["before"][k])}
        assert moved, "no expert was trained"
        assert got["spread"] == 0.0, name
        assert ("ep" in got["mesh_axes"]) == any(size.startswith("ep=") for size in sizes)
        checked += 1
    assert checked == expected


def test_mixtures_of_experts_equal_the_plain_loop(one: Results, two: Results, four: Results) -> None:
    check_moe(two, one, 6)
    check_moe(four, one, 5)


def test_training_lowers_the_loss(one: Results) -> None:
    for name, got in one.items():
        if len(got.get("losses", ())) == 10:  # the short run sees no row twice
            assert got["losses"][-1] < got["losses"][0], name


def test_global_batch_does_not_depend_on_the_local_batch(one: Results) -> None:
    losses = [one[f"train-llama-full-padded-none-{size}"]["losses"] for size in (8, 2, 1)]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


def check_initial_weights(results: Results, one: Results) -> None:
    for name, got in results.items():
        _, model, method, rows, *_ = name.split("-")
        if rows == "uneven" or "before" not in got or (model, method, rows) in MOE or low_precision(name):
            continue
        want = one[f"train-{model}-{method}-{rows}-fsdp2-8"]["before"]
        assert all(torch.equal(got["before"][key], want[key]) for key in want), name


def test_initial_weights_do_not_depend_on_the_ranks(one: Results, two: Results, four: Results) -> None:
    check_initial_weights(two, one)
    check_initial_weights(four, one)
    adapted = one["train-llama-lora-padded-fsdp2-8"]["before"]
    assert any(adapted[key].abs().sum() > 0 for key in adapted if "lora_A" in key)


def test_a_directory_is_loaded_into_its_shards_within_their_memory(two: Results, four: Results) -> None:
    check_loading(two)
    check_loading(four)


def test_between_micro_batches_only_gradients_of_adapters_are_whole(two: Results) -> None:
    (got,) = (got for name, got in two.items() if name.startswith("reduced_early"))
    assert got["reduced"] == ["model.lm_head.weight", "model.model.embed_tokens.weight"]
    assert got["whole"] > 20


def test_frozen_weights_are_bit_identical(two: Results) -> None:
    name = "train-qwen3-lora-padded-fsdp2-2"
    before, after = two[name]["before"], two[name]["weights"]
    frozen = [key for key in before if "lora_" not in key]
    assert frozen
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    moved = [key for key in before if "lora_" in key and not torch.equal(before[key], after[key])]
    assert len(moved) == len([key for key in before if "lora_" in key])


def test_frozen_bf16_weights_train_like_float32_masters_to_the_bit(one: Results, two: Results) -> None:
    check_frozen(one, {"llama": 0.0})
    check_frozen(two, {"qwen3": 1.0, "llama": 1.0, "mixtral": 0.0})


@pytest.mark.parametrize("mesh", ["fsdp2-2", "fsdp2-4-2"])
def test_what_freeze_names_is_bit_identical_and_the_rest_moves(two: Results, mesh: str) -> None:
    got = two[f"train-qwen3-frozen-packed-{mesh}"]
    frozen = {key for key in got["before"] if "embed_tokens" in key or ".layers.0." in key or ".layers.1." in key}
    same = {key for key in got["before"] if torch.equal(got["before"][key], got["weights"][key])}
    assert same == frozen
    assert len(frozen) == 1 + 2 * 11


def test_modules_to_save_are_trained(two: Results) -> None:
    for name, ends in {
        "qwen3-whole-padded-fsdp2-2": ("embed_tokens", "lm_head"),
        "llama-whole_tied-padded-fsdp2-2": ("embed_tokens",),
    }.items():
        got = two[f"train-{name}"]
        moved = {k for k in got["before"] if "lora_" not in k and not torch.equal(got["before"][k], got["weights"][k])}
        assert {key.split(".")[-2] for key in moved} >= set(ends)
        assert all(key.split(".")[-2] in ("embed_tokens", "lm_head") for key in moved)


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("loss=cross_entropy", 1e-6),
        ("loss_chunk_size=3", 1e-6),
        ("activation_checkpointing=full", 1e-6),
        ("activation_checkpointing=selective", 1e-6),
        ("activation_checkpointing=every_3", 1e-6),
        ("attention=sdpa", 1e-5),
        ("cpu_offload=True", 1e-6),
        ("compile=True", 1e-5),
        ("num_data_workers=2", 1e-6),
    ],
)
def test_settings_that_must_not_change_the_curve(one: Results, setting: str, tolerance: float) -> None:
    base = one["train-llama-full-packed-fsdp2-8"]
    got = one[f"train-llama-full-packed-fsdp2-4-{setting}"]
    for_norms = max(tolerance, 1e-5)
    if setting.startswith("activation_checkpointing"):  # the same micro-batches without it, made by two workers
        base, for_norms = one["train-llama-full-packed-fsdp2-4-num_data_workers=2"], 1e-6
    if setting == "num_data_workers=2":
        base = one["train-llama-full-packed-fsdp2-4-activation_checkpointing=full"]
    torch.testing.assert_close(got["losses"], base["losses"], rtol=tolerance, atol=0)
    torch.testing.assert_close(got["grad_norms"], base["grad_norms"], rtol=for_norms, atol=0)


@pytest.mark.full
def test_recomputation_of_compiled_layers_does_not_change_the_curve(
    rest: tuple[Results, Results, Results], one: Results
) -> None:
    (got,), base = rest[0].values(), one["train-llama-full-packed-fsdp2-8"]
    for key in ("losses", "grad_norms"):
        torch.testing.assert_close(got[key], base[key], rtol=1e-5, atol=0)


def test_validation_loss_does_not_depend_on_the_ranks(one: Results, two: Results) -> None:
    name = "train-llama-full-padded-fsdp2"
    torch.testing.assert_close(
        two[f"{name}-2"]["validation_losses"], one[f"{name}-8"]["validation_losses"], rtol=1e-5, atol=0
    )


def test_the_last_checkpoints_are_kept(two: Results) -> None:
    assert two["train-llama-full-padded-fsdp2-2"]["checkpoints"] == ["step_10", "step_8"]


def test_weights_trained_in_bf16_have_float32_logits(two: Results) -> None:
    found = {name: got for name, got in two.items() if name.startswith("bf16_logits")}
    assert len(found) == 7 + len(FP8)
    for name, got in found.items():
        size = got["plain"].abs().max()
        assert (got["float32"] - got["plain"]).abs().max() <= 1e-5 * size, name
        assert (got["bf16"] - got["plain"]).abs().max() > 1e-4 * size, name
        assert (got["untrained"] - got["plain"]).abs().max() > 1e-2 * size, name


def test_weights_kept_in_bf16_follow_the_float32_curve(two: Results, one: Results) -> None:
    got = two["train-qwen3-full-packed-fsdp2-2-precision=bf16_pure"]
    want = one["reference-qwen3-full-packed"]
    torch.testing.assert_close(got["losses"], want["losses"], rtol=1e-2, atol=0)
    assert got["losses"] != want["losses"]
    assert {t.dtype for n, t in got["weights"].items()} == {torch.bfloat16}
    assert got["moments"] == ["torch.float32"]
    assert one["train-qwen3-full-packed-fsdp2-8"]["moments"] == ["torch.float32"]


def test_8_bit_products_follow_the_float32_curve(two: Results, one: Results) -> None:
    found = {name: got for name, got in two.items() if name.startswith("train-") and "fp8" in name}
    assert len(found) == len(FP8_CURVES)
    for name, got in found.items():
        _, model, method, rows, *_ = name.split("-")
        want = one[f"reference-{model}-{method}-{rows}"]["losses"]
        allowed = 2e-2 * (want[0] - want[-1])  # of how far it falls: of the losses themselves it would say little here
        assert 1e-3 < allowed < 1e-2
        assert max(abs(a - b) for a, b in zip(got["losses"], want, strict=True)) <= allowed, name
        assert got["losses"] != want


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_packed_documents_leak_is_found(one: Results, precision: str) -> None:
    found = {m: one[f"leak-{m}-full-packed-fsdp2-precision={precision}"]["leak"] for m in ("llama", "qwen3", "mamba")}
    assert found["llama"] is None
    assert found["qwen3"] is None
    assert found["mamba"] > 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_of_a_pipeline_does_not_depend_on_the_steps_before(two: Results, schedule: str) -> None:
    first, again, other, last = two[f"same_shape_again-llama-full-packed-fsdp2-2-{schedule}"]["found"]
    assert first == again == last
    assert other[0] != first[0]


def test_a_pipeline_can_be_asked_whether_it_leaks(two: Results) -> None:
    assert two["leak-llama-full-packed-fsdp2-2-interleaved"]["leak"] is None


def test_a_teacher_is_sharded_as_its_student_is(one: Results, two: Results) -> None:
    assert one["train-qwen3-kd-packed-fsdp2-8"]["teacher_shares"] == [1.0]
    assert two["train-qwen3-kd-packed-fsdp2-2"]["teacher_shares"] == [2.0]
    assert two["train-qwen3-kd-packed-ddp-2-2"]["teacher_shares"] == [1.0]  # whole on each rank, as weights are there


def test_a_split_vocabulary_equals_cross_entropy_in_value_and_gradient(two: Results, four: Results) -> None:
    for results in (two, four):
        check_split_vocabulary(results["split_vocabulary-llama-full-packed"])


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_optimizers_over_shards_equal_their_references(
    one: Results, two: Results, four: Results, ranks: int, tp: int
) -> None:
    found = {1: one, 2: two, 4: four}[ranks][f"optimizers-llama-full-packed-{tp}"]
    assert set(found) == set(OPTIMIZERS) - ({"adamw8bit"} if tp > 1 else set())
    for name, got in found.items():
        assert max(got["off"].values()) <= 1e-6, (name, got["off"])
        assert got["dtypes"] == ["torch.float32"], name
        assert got["eight_bits"] == (["large.weight"] if name == "adamw8bit" else [])
