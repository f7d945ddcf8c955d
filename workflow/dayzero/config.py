"""Every key a run can set, with its type, unit and default: the single source of the schema, the defaults and the docs.

A field's docstring says what it means, its unit and its "off" value. Values are never converted in silence: a key that
is not here, a text where a number belongs (YAML reads ``1e-4`` as text) or a bad combination is refused. How recipe,
experiment, run and command line are merged into one `RunConfig` stands in `experiment.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class TokenizerTraining(_Section):
    """A byte-level BPE tokenizer trained on the run's own training text (for pretraining from scratch)."""

    vocab_size: PositiveInt = 4096
    """Entries in the vocabulary, special tokens included."""


class Model(_Section):
    """Which model, from where."""

    source: str | None = None
    """`hf:org/name@revision`, a local HF directory or GGUF file, or `package:NAME==VERSION/path/inside`."""
    sha256: str | dict[str, str] | None = None
    """Expected SHA-256 of the source file, or of each named file of a directory. null: recorded, not checked."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Store the weights in this dtype (GGUF weights are dequantised to it, by default bfloat16). null: as they are."""
    architecture: dict[str, Any] | None = None
    """Fields of a transformers config (with `model_type`) for random weights; only with method.name pretrain."""
    tokenizer: TokenizerTraining | None = None
    """Train a tokenizer on the run's data instead of using the model's own. null: the model's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template that replaces the model's own. null: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off: such a model is refused."""
    allow_pickle: bool = False
    """Load pickled weights (.bin, .pt), which can run code when read. Off: only safetensors and GGUF."""


class Data(_Section):
    """Which rows, from where, and how they are split."""

    source: str | list[str] | None = None
    """`hf:org/name@revision`, local files, or `package:NAME==VERSION/path/inside`; several are concatenated."""
    validation_source: str | list[str] | None = None
    """Rows for the validation loss (of an `hf:` data set its split `validation`). null: cut, see `validation_size`."""
    test_source: str | list[str] | None = None
    """Held-out rows for evaluation (of an `hf:` data set its split `test`). null: cut, see `test_size`."""
    answers: str | list[str] | None = None
    """Only for format function_calling: the files with the accepted answers, joined on `id`."""
    sha256: str | dict[str, str] | None = None
    """Expected SHA-256 of the source file, or of each source by its text. null: recorded, not checked."""
    weights: list[PositiveFloat] | None = None
    """Share of the training samples that comes from each `source`, in its order. null: rows are just joined."""
    format: Literal[
        "auto",
        "text",
        "prompt_completion",
        "messages",
        "sharegpt",
        "alpaca",
        "squad",
        "multiple_choice",
        "template",
        "pretokenized",
        "function_calling",
    ] = "auto"
    """How a row is read (docs/data.md). auto: from the column names of each source, with the verdict printed."""
    template: dict[str, str] | None = None
    """Texts with `{column}` in them, as `text`, `prompt` + `completion`, or `user` + `assistant` (+ `system`)."""
    columns: dict[str, str] = {}
    """Other names for the format's columns, e.g. `{prompt: question, completion: answer}`."""
    subset: str | None = None
    """For `hf:` sources: the dataset's configuration name. null: its default."""
    split: str = "train"
    """For `hf:` sources: the split to read as `source`."""
    validation_size: NonNegativeInt | float = 0.05
    """Rows (an integer) or share (below 1) cut for validation where the data has none. 0: no validation."""
    test_size: NonNegativeInt | float = 0
    """Rows or share held out for evaluation where the data has none. 0: no test split."""
    split_seed: NonNegativeInt = 0
    """Seed of the split, apart from the run's seed so that all seeds of a sweep share one split."""
    max_rows: PositiveInt | None = None
    """Read at most this many rows of `source`. null: all."""
    max_chars: PositiveInt | None = None
    """Leave out rows with more characters than this, and count them. null: no limit."""
    on_bad_row: Literal["fail", "reject"] = "fail"
    """A row that breaks its format (named by file and line): fail the stage, or set it aside in rejected.jsonl."""
    streaming: bool = False
    """Read `hf:` sources over the network without a copy on this disk. On by itself where `max_rows` is set."""


class DataCheck(_Section):
    """What the data report looks at, and what it does not let pass (docs/data.md)."""

    max_contamination: float | None = Field(default=0.05, ge=0, le=1)
    """Largest share of a task's items that may stand in the training rows; more fails the stage. null: any share."""
    ngram: PositiveInt = 8
    """Words in a row by which an item is found in a training row; shorter items are too short to tell."""
    overlap: float = Field(default=0.7, gt=0, le=1)
    """An item counts as contaminated when this share of its word runs stands in training rows."""
    near_duplicate: float = Field(default=0.8, gt=0, lt=1)
    """Rows are near-duplicates when they share this much of their runs of 5 words (Jaccard similarity)."""
    sample_rows: PositiveInt = 20_000
    """Rows of a split that near-duplicates are looked for among; of more rows a share, the same every time."""


class Tokenize(_Section):
    """From rows to token rows of at most `seq_len`."""

    seq_len: PositiveInt = 1024
    """Tokens in a row; at most the model's context length."""
    packing: bool = True
    """Several documents in a row, none attending to another. Off: one document in a row."""
    long_documents: Literal["truncate", "split", "drop"] = "truncate"
    """What happens to documents longer than `seq_len`; each case is counted in the manifest."""
    min_label_tokens: PositiveInt = 1
    """Drop (and count) documents with fewer supervised tokens than this, e.g. after truncation."""
    loss_turns: Literal["all", "last"] = "all"
    """Conversations: which turns of `loss_roles` are supervised."""
    loss_roles: list[Literal["assistant", "user", "system", "tool"]] = ["assistant"]
    """Conversations: whose turns are supervised, with the token that ends each."""
    loss_parts: Literal["all", "tool_arguments"] = "all"
    """Conversations: all of a turn, or only the arguments of its tool calls."""
    loss_reasoning: bool = True
    """Conversations: supervise reasoning (`reasoning_content`, or a `<think>` block that opens the content) too."""
    special_text: Literal["auto", "plain", "special"] = "auto"
    """What a control token's text (`<|im_end|>`) in a row becomes. auto: text in conversations, else the token."""


class Lora(_Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input. 0: off."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, so that higher ranks learn as fast (rsLoRA,
    https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the length of each weight row apart from its direction (DoRA, https://arxiv.org/abs/2402.09353). Not with
    tp > 1 nor on fused experts."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapters, by the end of their names, e.g. [embed_tokens, lm_head]; they are
    kept in the adapter's files, as PEFT's modules_to_save."""
    targets: str | list[str] = "all-linear"
    """Module name suffixes, one regular expression over full names, or `all-linear`: every linear module that an
    adapter can serve but the LM head, and fused experts (which stay frozen with dropout or DoRA; the log says so)."""


class Kd(_Section):
    """Knowledge distillation (https://arxiv.org/abs/1503.02531): the loss is cross-entropy + `weight` * KL(teacher ||
    model) over the label tokens."""

    teacher: str | None = None
    """A run of this experiment (its exported model), or a model as in `model.source`; with the same tokenizer."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the KL is multiplied by its square, so that gradients keep their size."""
    weight: PositiveFloat = 1.0
    """Weight of the KL."""


class Method(_Section):
    """How the model is trained."""

    name: Literal["none", "full", "lora", "qlora", "kd", "pretrain"] = "lora"
    """none: the untouched model; full: all weights; lora: adapters; qlora: adapters over a base in 4 bits (GPU); kd:
    all weights, with a teacher beside the labels; pretrain: all weights from random ones."""
    lora: Lora = Lora()
    kd: Kd = Kd()
    freeze: list[str] = []
    """Parameters that are not trained, by patterns (with * ? [ ]) of their whole names, e.g. "*.layers.0.*". Not with
    adapters, which leave all else frozen."""

    @property
    def adapters(self) -> Lora | None:
        """What adapters are trained; None where none are."""
        return self.lora if self.name in ("lora", "qlora") else None

    def used(self) -> dict[str, Any]:
        """The keys that decide what this method does."""
        kept = {"name"} | ({"lora"} if self.adapters else set()) | ({"freeze"} if self.freeze else set())
        kept |= {"kd"} if self.name == "kd" else set()
        return self.model_dump(mode="json", include=kept)


class Muon(_Section):
    """What only train.optimizer.name muon uses (https://kellerjordan.github.io/posts/muon/)."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead of the momentum."""
    num_iterations: PositiveInt = Field(default=5, lt=100)
    """Newton-Schulz iterations, in bfloat16, that make a matrix orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How a matrix's shape scales its step. match_rms_adamw: as large as AdamW's, so that AdamW's learning rate and
    weight decay fit (https://arxiv.org/abs/2502.16982); original: sqrt(max(1, outputs / inputs))."""
    lr: PositiveFloat | None = None
    """Peak learning rate of the matrices. null: train.optimizer.lr."""


class Adafactor(_Section):
    """What only train.optimizer.name adafactor uses (https://arxiv.org/abs/1804.04235)."""

    beta2_decay: float = Field(default=-0.8, le=0)
    """The second moment's new share at step t is t to the power of this."""
    clip_threshold: float = Field(default=1.0, ge=1)
    """Largest root mean square of an update, before the learning rate."""


class Optimizer(_Section):
    """The optimizer, with decoupled weight decay; none on biases, norms and embeddings (docs/methods.md)."""

    name: Literal["adamw", "muon", "adafactor", "adamw8bit"] = "adamw"
    """adamw: https://arxiv.org/abs/1711.05101; muon: Muon for the matrices of the layers, AdamW for the rest;
    adafactor: second moments of rows and columns only; adamw8bit: AdamW with moments of 8 bits (torchao)."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices. 0: off."""
    implementation: Literal["auto", "fused", "foreach", "for-loop"] = "auto"
    """Which of torch's AdamW. auto: fused, the fastest measured (docs/methods.md), where the device has it."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the moments, whatever that of the weights. Steps are computed in float32."""
    muon: Muon = Muon()
    adafactor: Adafactor = Adafactor()


class LrScheduler(_Section):
    """The learning rate over the steps: linear warm-up, then the named curve."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: warm-up, stable, then linear decay over the last `decay_steps` (https://arxiv.org/abs/2404.06395)."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to the peak. 0: no warm-up."""
    decay_steps: NonNegativeInt | None = None
    """For wsd: steps of the final decay. null: a tenth of all steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The last learning rate as a share of the peak."""


class Checkpoint(_Section):
    """Checkpoints to resume from (torch.distributed.checkpoint)."""

    every: NonNegativeInt = 100
    """Steps between checkpoints. 0: only at the end and when asked to stop."""
    keep_last: PositiveInt = 2
    """Complete checkpoints kept, the newest ones."""
    keep_best: NonNegativeInt = 0
    """Checkpoints kept besides for their lowest validation loss. Only those of steps with a validation count, so
    `validate_every` must divide `every`; one made when asked to stop may have none. 0: off."""
    asynchronous: bool = True
    """Write in the background: training waits only while weights and optimizer state are copied to the CPU's memory,
    which needs room for a second copy of this rank's share. Off: training waits for the disk."""


class Ema(_Section):
    """An exponential moving average of the weights, kept beside them at the same size in memory."""

    decay: float = Field(gt=0, lt=1)
    """Share of the average that stays in each step, e.g. 0.999."""


class Fp8(_Section):
    """Matrix products of the layers' linears in 8-bit floats, over bf16 (docs/methods.md)."""

    backend: Literal["torchao", "transformer_engine"] = "torchao"
    """Whose products: torchao's (frozen weights: our own), or NVIDIA's transformer-engine, under its autocast."""
    recipe: Literal["tensorwise", "rowwise", "delayed", "block", "mxfp8"] = "tensorwise"
    """One scale for a whole tensor (fastest), or with torchao for each row (closer). transformer_engine has besides
    tensorwise: delayed (scales of earlier steps), block, and on Blackwell mxfp8."""
    all_gather: bool = False
    """Gather weights in 8 bits too: half the traffic of FSDP2. Only tensorwise, and for weights that are trained."""
    skip: list[str] = []
    """Names of linears, whole or their last parts, that stay as they are."""
    emulate: bool = False
    """Round to 8 bits but multiply in float32: slow, to see the rounding's effect on any machine."""


class Train(_Section):
    """The training loop."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. null: as `num_epochs` says."""
    num_epochs: PositiveFloat | None = None
    """Passes over the training rows. null: as `max_steps` says."""
    global_batch_size: PositiveInt = 32
    """Rows in an optimizer step, over all ranks and micro-batches."""
    local_batch_size: PositiveInt = 4
    """Rows in one forward pass of one rank; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16", "bf16_pure"] = "bf16"
    """bf16: compute in bfloat16, weights in float32, gradients reduced in float32. bf16_pure: weights in bfloat16 too,
    which saves half their memory and loses small updates. Moments: optimizer.state_dtype. Rotary tables: float32."""
    fp8: Fp8 | None = None
    """Compute in 8-bit floats (NVIDIA GPUs from Ada on). null: off."""
    loss: Literal["auto", "cross_entropy", "chunked", "cut_cross_entropy", "liger_fused", "loss_parallel"] = "auto"
    """chunked: only label positions pass the LM head, in chunks, so that full logits never exist. cut_cross_entropy,
    liger_fused: kernels without logits (GPU). loss_parallel: each tp rank has its share of the vocabulary. auto: the
    best that can be had; the log says which and why. See docs/methods.md."""
    loss_chunk_size: PositiveInt = 1024
    """Label positions in a chunk, for chunked and loss_parallel."""
    z_loss: PositiveFloat | None = None
    """Adds so many times the mean over label tokens of the squared log of the sum of exponentials, e.g. 1e-4 (PaLM,
    https://arxiv.org/abs/2204.02311). null: off."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load balancing loss of a mixture of experts (the mean over rows of each row's). null: the model's
    own where its config has output_router_logits, else off. 0: off."""
    ema: Ema | None = None
    """Keep an average of the weights, which `export.weights: ema` exports. null: off."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this. 0: off."""
    activation_checkpointing: str = Field(
        default="none",
        pattern=r"^(none|full|selective|every_[1-9][0-9]*)$",
        examples=["none", "full", "selective", "every_2"],
    )
    """full: keep only each layer's input and compute the rest again in the backward pass; every_N: so for every N-th
    layer; selective: keep the results of attention and of every second matrix product."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the CPU's memory, and step there (strategy fsdp2)."""
    compile: bool = False
    """torch.compile each layer, into one graph where it can be one. What is compiled is kept in the user's cache."""
    attention: Literal["auto", "documents", "sdpa", "eager", "flex", "varlen"] = "auto"
    """documents: SDPA for one packed document after the other; flex (FlexAttention) and varlen (all documents in one
    call): CUDA only. auto: documents on a CPU, else the model's own (docs/methods.md)."""
    kernels: Literal["auto", "none", "liger"] = "auto"
    """liger: Liger's norms, rotary embeddings and MLPs (NVIDIA GPUs, models it knows). auto: where they run."""
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LrScheduler = LrScheduler()
    validate_every: NonNegativeInt = 50
    """Steps between validation losses. 0: only at the end."""
    checkpoint: Checkpoint = Checkpoint()
    num_data_workers: NonNegativeInt = 0
    """Loader processes for each rank. 0: in the training process."""


class Parallelism(_Section):
    """How the ranks share the work; the world size is the product of the sizes."""

    strategy: Literal["fsdp2", "ddp", "megatron_fsdp", "none"] = "fsdp2"
    """megatron_fsdp: NVIDIA's Megatron-FSDP (NVIDIA GPUs and the package megatron-fsdp), over dp_shard alone; not with
    lora, compile or tied weights. none: one bare process without wrappers, the reference that all others are compared
    with."""
    dp_replicate: PositiveInt = 1
    """Data-parallel replicas (all of them for ddp; HSDP when dp_shard > 1 too)."""
    dp_shard: PositiveInt = 1
    """Ranks that share one copy of weights, gradients and optimizer state (FSDP2)."""
    tp: PositiveInt = 1
    """Ranks that split each attention and MLP matrix (tensor parallelism); must divide the numbers of heads. 1: off."""
    sequence_parallel: bool = False
    """With tp > 1: each rank keeps only its share of the tokens between the split matrices."""
    cp: PositiveInt = 1
    """Ranks that split the tokens of each row (context parallelism), for long rows. 1: off."""
    cp_method: Literal["allgather", "ulysses", "ring"] = "allgather"
    """How attention reaches the other ranks' tokens: keys gathered, heads exchanged, or keys passed round."""
    pp: PositiveInt = 1
    """Ranks (of each data-parallel share) that split the layers between them (pipeline parallelism), at most as many as
    there are layers; global_batch_size / (local_batch_size x dp) micro-batches, at least `pp`, keep them busy. 1: off.
    """
    pp_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """1f1b: one piece of the model a rank. interleaved, zero_bubble: two pieces a rank (pp x 2 at most the layers) and
    less waiting; interleaved passes round twice, zero_bubble there and back, with weight gradients filling the waits.
    """
    ep: PositiveInt = 1
    """Ranks that share out a mixture's experts and exchange tokens; borrowed from dp_shard x cp. 1: off."""

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp


class Export(_Section):
    """The plain Hugging Face directory made of the trained weights."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the exported weights. null: that of the stored base model (float32 for pretrain)."""
    weights: Literal["last", "ema"] = "last"
    """The trained weights as they were at the end, or their average (`train.ema`)."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file."""


class Evaluate(_Section):
    """Scores by lm-eval."""

    tasks: list[str] = []
    """Tasks of config/tasks or built into lm-eval. Empty: no evaluation."""
    extra_tasks: list[str] = []
    """Tasks of this run beside the experiment's."""
    limit: PositiveInt | None = None
    """Items of each task. null: all."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Prompts in a batch. auto: what memory allows."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Compute dtype. auto: as exported."""
    seed: NonNegativeInt = 1234
    """Seed of few-shot sampling."""


class Serving(_Section):
    """The comparison of vLLM with transformers on the exported directory."""

    num_prompts: PositiveInt = 4
    """Prompts taken from the validation rows."""
    max_new_tokens: PositiveInt = 16
    """Greedy tokens compared for each prompt."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are cut to their last tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype of both sides; only float32 can be expected to agree token by token."""
    tolerance: PositiveFloat = 1e-3
    """Largest allowed difference of a prompt token's log probability."""


class _AnyResources(_Section):
    threads: PositiveInt = 2
    mem_mb: PositiveInt = 4000
    """Memory in MB."""
    runtime: PositiveInt = 60
    """Time limit in minutes."""


class StageResources(_AnyResources):
    """What one stage asks of the machine. Changing it reruns nothing."""

    gpu: NonNegativeInt = 0
    """GPUs."""


class TrainResources(_AnyResources):
    """What training asks of the machine: of each node, where it has several. Changing it reruns nothing."""

    mem_mb: PositiveInt = 6000
    """Memory in MB."""
    runtime: PositiveInt = 240
    """Time limit in minutes."""
    gpu: NonNegativeInt | Literal["auto"] = 0
    """GPUs of each node. auto: one for each process."""
    nodes: PositiveInt = 1
    """Nodes of a SLURM job; must divide the number of processes, which the sizes of `parallelism` make. Without SLURM
    all processes run on this machine."""
    stop_before: NonNegativeInt = 120
    """Seconds before the time limit at which SLURM asks training to write a checkpoint; the job is then put back into
    the queue and goes on from there. 0: never asked."""
    max_requeues: NonNegativeInt = 100
    """How often a job is put back into the queue before training gives up. 0: never put back."""
    network_interface: str | None = None
    """Network interface of every node for NCCL and gloo (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME). null: they choose."""


class Resources(_Section):
    """Machine settings by stage; they are not part of a run's identity."""

    fetch: StageResources = StageResources(threads=1, mem_mb=4000, runtime=120)
    check_data: StageResources = StageResources(threads=1)
    tokenize: StageResources = StageResources()
    train: TrainResources = TrainResources()
    export: StageResources = StageResources(mem_mb=6000)
    evaluate: StageResources = StageResources(mem_mb=6000, runtime=240)
    verify_serving: StageResources = StageResources(mem_mb=6000)
    report: StageResources = StageResources(threads=1, mem_mb=2000)


class RunConfig(_Section):
    """One run: everything that decides its result, plus `resources`, which does not."""

    experiment: str
    """The experiment's name: its file's name without .yaml."""
    run: str
    """The run's name within the experiment."""
    seed: NonNegativeInt = 0
    """Seed of weights, adapters, dropout and the order of rows."""
    model: Model = Model()
    data: Data = Data()
    data_check: DataCheck = DataCheck()
    tokenize: Tokenize = Tokenize()
    method: Method = Method()
    train: Train = Train()
    parallelism: Parallelism = Parallelism()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    serving: Serving = Serving()
    resources: Resources = Resources()

    def resolved(self) -> dict[str, Any]:
        """What config.json holds: every key but the machine settings."""
        return self.model_dump(mode="json", exclude={"resources"})
