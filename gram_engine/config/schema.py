"""Typed configuration: dataclasses -> command line and YAML, with Megatron's flag names.

One dataclass per concern; every field is a flag (``tensor_model_parallel_size`` is ``--tensor-model-parallel-size``) and a
YAML key of the same name; parse.py reads both.  validate.py refuses combinations that cannot work before any process group
starts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import yaml

from gram_engine.config.parallel_dims import ParallelDims
from gram_engine.config.task import TASKS, ObjectiveName, Task
from gram_engine.files import write_atomically
from gram_engine.log import redact

# FP8 matrix products need a number of rows that is a multiple of this, by --fp8-recipe.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


@dataclass
class ModelConfig:
    """Shape of the LLaMA or Qwen3 model. Give a preset, a Hugging Face folder (--load-hf), or the fields one by one."""

    model: Optional[str] = None
    """Preset that fills the fields below: see gram_engine/model/shapes.py (tiny, llama-3.2-1b, llama-3.1-8b ...)."""
    num_layers: Optional[int] = None
    """Transformer layers."""
    hidden_size: Optional[int] = None
    """Width of the residual stream."""
    ffn_hidden_size: Optional[int] = None
    """Width of the SwiGLU feed-forward layer."""
    num_attention_heads: Optional[int] = None
    """Query heads."""
    num_query_groups: Optional[int] = None
    """Key/value heads (grouped-query attention); default: as many as query heads."""
    kv_channels: Optional[int] = None
    """Dimension of one head; default: hidden_size / num_attention_heads."""
    vocab_size: Optional[int] = None
    """Rows of the embedding before padding; default: the tokenizer's size."""
    make_vocab_size_divisible_by: int = 32
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Optional[int] = None
    """max_position_embeddings of the exported config.json; default: --seq-length."""
    rotary_base: Optional[float] = None
    """Base of the rotary position embedding (Hugging Face: rope_theta); default: 10000."""
    rope_scaling_factor: Optional[float] = None
    """LLaMA-3.1 rotary scaling: 8 for 3.1, 32 for 3.2; unset: no scaling."""
    norm_epsilon: Optional[float] = None
    """Epsilon of RMSNorm; default: 1e-5."""
    untie_embeddings_and_output_weights: Optional[bool] = None
    """Whether the output layer has its own weight; default: True (LLaMA-3.2 1B and 3B share the embedding's)."""
    qk_layernorm: Optional[bool] = None
    """RMSNorm on the queries and keys of each head, as in Qwen3; default: off."""
    init_method_std: float = 0.02
    """Standard deviation of the random initialisation."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which layers to use; auto: Transformer Engine's where it is installed and a GPU is used, else local ones."""
    lora_rank: Optional[int] = None
    """Freeze the model and train LoRA adapters of this rank; unset: all weights are trained."""
    lora_alpha: Optional[float] = None
    """LoRA: an adapter's output is scaled by alpha / rank; default: twice the rank."""
    lora_modules: tuple[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """LoRA: linear layers with adapters, in attention (qkv, proj) and in the MLP (fc1: gate and up, fc2: down)."""
    load_hf: Optional[str] = None
    """Start from the weights, shape and (unless --tokenizer-model is given) tokenizer of this Hugging Face folder."""
    transformer_config: tuple[str, ...] = ()
    """KEY=VALUE pairs passed to megatron-core's TransformerConfig unchanged, e.g. attention_softmax_in_fp32=true."""


@dataclass
class DataConfig:
    """Preference data, tokenizer and judge template."""

    data: tuple[str, ...] = ()
    """Training files (JSONL, JSON, .gz, Parquet) or hub data sets (hf:NAME:SPLIT); preprocessed on first use."""
    valid_data: tuple[str, ...] = ()
    """Validation files, read like --data, with both orders of every pair."""
    data_path: Optional[str] = None
    """Prefix of preprocessed training data (from gram preprocess), instead of --data."""
    valid_data_path: Optional[str] = None
    """Prefix of preprocessed validation data, instead of --valid-data."""
    data_cache_path: str = "runs/data-cache"
    """Folder for the preprocessed --data and --valid-data, on a file system that all nodes share."""
    tokenizer_type: Literal["auto", "SentencePieceTokenizer", "HuggingFaceTokenizer"] = "auto"
    """Kind of tokenizer; auto: SentencePiece for a .model file, Hugging Face for a folder."""
    tokenizer_model: Optional[str] = None
    """SentencePiece .model file or Hugging Face tokenizer folder."""
    template: Optional[str] = None
    """Judge template: gram-code (the authors' code), gram-paper (Figure 7), or the path of a template file; default: that
    of the data at --data-path, else gram-code."""
    pair_order: Literal["random", "both"] = "random"
    """Each pair once, in a seeded random order of its two responses, or in both orders."""
    ties: Literal["half", "drop"] = "half"
    """Pairs without a winner: train towards 1/2, or drop them (stage 2 and bradley-terry)."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a sample longer than --seq-length: truncate its responses (the longer first), drop it, or stop."""
    skip_bad_rows: bool = False
    """Count bad rows and write them to PREFIX.rejects.jsonl instead of stopping at the first."""
    seq_length: int = 2048
    """Maximum tokens of one sample; bradley-terry: of each of its two sequences."""
    preprocess_workers: int = 1
    """Processes that tokenise --data."""
    prompt_key: Optional[str] = None
    """Name of the field with the prompt; default: the usual names are tried."""
    chosen_key: Optional[str] = None
    """Name of the field with the preferred response; default: the usual names are tried."""
    rejected_key: Optional[str] = None
    """Name of the field with the other response; default: the usual names are tried."""


@dataclass
class ParallelConfig:
    """How the model and the data are divided over processes (data-parallel size = processes / (TP x PP x CP))."""

    tensor_model_parallel_size: int = 1
    """TP: processes that each layer is split over."""
    pipeline_model_parallel_size: int = 1
    """PP: pipeline stages."""
    num_layers_per_virtual_pipeline_stage: Optional[int] = None
    """Layers per virtual pipeline stage (interleaved schedule); unset: no virtual stages."""
    decoder_first_pipeline_num_layers: Optional[int] = None
    """Layers of the first pipeline stage; unset: as many as the others."""
    decoder_last_pipeline_num_layers: Optional[int] = None
    """Layers of the last pipeline stage; unset: as many as the others. The log line on pipeline balance suggests a number."""
    context_parallel_size: int = 1
    """CP: processes that every sequence is split over, for samples too long for one GPU."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel processes (needs TP > 1)."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and main parameters over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass (needs --use-distributed-optimizer and --overlap-grad-reduce)."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products (Transformer Engine; needs --sequence-parallel)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto: CUDA if there is a GPU."""
    distributed_timeout_minutes: float = 30
    """The run ends when a collective waits longer than this."""

    def dims(self, world_size: int) -> ParallelDims:
        """This layout over `world_size` processes."""
        return ParallelDims(
            world_size=world_size,
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            cp=self.context_parallel_size,
            layers_per_virtual_stage=self.num_layers_per_virtual_pipeline_stage,
            first_stage_layers=self.decoder_first_pipeline_num_layers,
            last_stage_layers=self.decoder_last_pipeline_num_layers,
            sequence_parallel=self.sequence_parallel,
        )


@dataclass
class TrainingConfig:
    """Objective, batch, length of the run, precision and optimizer."""

    objective: ObjectiveName = "pair-preference"
    """response-lm: stage 1 (Eq. 4). pair-preference: stage 2, label tokens (Eq. 6-8). bradley-terry: scalar head (Eq. 1)."""
    response_loss: Literal["both", "a", "b"] = "both"
    """Stage 1: responses that carry loss; 'b' is the paper's GRAM-v3, 'a' its GRAM-v4."""
    marker_loss: bool = True
    """Stage 1: also learn the marker lines around the responses and the end of the text."""
    label_smoothing: float = 0.1
    """Stage 2: the paper's eps, weight of the wrong label. (torch's label_smoothing = 2 eps: the authors' YAML 0.1 is 0.05.)"""
    label_softmax: Literal["two-token", "full-vocabulary"] = "two-token"
    """Stage 2: softmax and smoothing over the two label tokens (Eq. 7-8), or over the vocabulary (Table 5, vanilla)."""
    sft_loss_weight: float = 0.0
    """bradley-terry: weight of -log p(chosen response | prompt), summed over its tokens (the + Regularization baseline)."""
    freeze: Optional[Literal["backbone", "embeddings"]] = None
    """Weights that stay as they are: all but the scalar head (bradley-terry), or the embedding (and a tied output layer)."""
    fused_losses: bool = True
    """Use the fused losses (gram_engine/kernels); off: plain PyTorch and autograd, slower, to compare with."""
    prune_last_layer: bool = True
    """Losses at label rows only: the last layer computes just keys and values away from these rows. Exact."""
    micro_batch_size: int = 1
    """A micro-batch is one pack of at most micro-batch-size x seq-length tokens (bradley-terry: twice that)."""
    global_batch_size: int = 32
    """Samples per step, over all processes; the loss is the mean over the labels of the whole step."""
    train_samples: Optional[int] = None
    """Length of the run in samples. Give one of --train-samples, --train-iters, --train-epochs."""
    train_iters: Optional[int] = None
    """Length of the run in steps."""
    train_epochs: Optional[float] = None
    """Length of the run in epochs (passes over the data)."""
    exit_interval: Optional[int] = None
    """Save and exit after this step; the learning-rate schedule stays that of the whole run."""
    exit_duration_in_mins: Optional[float] = None
    """Save and exit after this many minutes of this process; the learning-rate schedule stays that of the whole run."""
    check_for_nan: bool = False
    """Stop at the first step whose loss or gradient is NaN or infinite; default: skip such a step."""
    max_skipped_steps: int = 5
    """Stop after this many skipped steps in a row."""
    loss_spike_factor: float = 3.0
    """Warn when a step's loss exceeds this multiple of its recent mean; 0: never."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 main parameters and gradients."""
    fp8_format: Optional[Literal["e4m3", "hybrid"]] = None
    """Compute the layers' matrix products in FP8 (Transformer Engine); hybrid: gradients in e5m2. Needs --bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 tensors are scaled: by past maxima, by the current maximum, per block (H100), per micro-block (B200)."""
    fp8_param_gather: bool = False
    """Keep the layers' weights only in FP8, next to fp32 main parameters (needs --use-distributed-optimizer)."""
    first_last_layers_bf16: bool = False
    """FP8: keep the first and the last layer in BF16 (not with --fp8-recipe delayed)."""
    deterministic_mode: bool = False
    """Use only deterministic kernels, so that runs are bitwise reproducible; slower on a GPU."""
    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay, counted in samples."""
    lr_warmup_fraction: float = 0.1
    """Fraction of the run during which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms are not decayed."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0: do not clip."""
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    """Recompute activations in the backward pass: of whole layers, or of the parts in --recompute-modules."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recompute. uniform: all layers, in groups of --recompute-num-layers; block: that many layers per pipeline stage."""
    recompute_num_layers: int = 1
    """Full recompute: see --recompute-method."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] = ("core_attn",)
    """Selective recompute: parts of each layer."""
    logits_chunk_size: Optional[int] = None
    """Stage 1: rows whose logits are in memory at a time; default: as many as fit in 128 MiB on a CPU, 1 GiB on a GPU."""
    seed: int = 1234
    """Seed of the initialisation, the pair order and the shuffling."""


@dataclass
class CheckpointConfig:
    """Saving, resuming and starting points."""

    save: Optional[str] = None
    """Folder for checkpoints (iter_0000100/ ...)."""
    save_interval: Optional[int] = None
    """Save every N-th step; the last step is always saved."""
    load: Optional[str] = None
    """Resume from the newest checkpoint in this folder; without one, training starts from the beginning."""
    pretrained_checkpoint: Optional[str] = None
    """Start from only the weights of the newest checkpoint in this folder, e.g. stage 1's --save."""
    load_optim: bool = True
    """Restore the optimizer when resuming."""
    async_save: bool = False
    """Write checkpoints in the background."""
    keep_last: Optional[int] = None
    """Keep only the N newest checkpoints; unset: all."""
    keep_every: Optional[int] = None
    """With --keep-last, also keep the checkpoints of steps that are multiples of this."""
    strict_load: bool = False
    """Stop at a damaged checkpoint; default: use the one before it, with a warning."""


@dataclass
class LoggingConfig:
    """What is logged, where and how often."""

    log_interval: int = 10
    """Steps between log lines."""
    eval_interval: Optional[int] = None
    """Evaluate on the validation data every N-th step and at the end."""
    tensorboard_dir: Optional[str] = None
    """Write TensorBoard events here."""
    wandb_project: Optional[str] = None
    """Report to Weights & Biases under this project (needs the wandb package)."""
    wandb_exp_name: Optional[str] = None
    """Name of the run at Weights & Biases."""
    peak_tflops: Optional[float] = None
    """Peak TFLOP/s of one device for MFU; default: known for common GPUs; unset on CPU: no MFU."""
    progress: bool = True
    """Show a progress bar when standard error is a terminal."""
    dry_run: bool = False
    """Check and print the resolved configuration, then exit."""


@dataclass
class Config:
    """Train a generative foundation reward model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to make_vocab_size_divisible_by x TP."""
        multiple = self.model.make_vocab_size_divisible_by * self.parallel.tensor_model_parallel_size
        return -(-self.model.vocab_size // multiple) * multiple

    @property
    def virtual_pipeline_size(self) -> Optional[int]:
        """Model chunks per pipeline stage, or None without virtual stages."""
        layers = self.parallel.num_layers_per_virtual_pipeline_stage
        if layers is None:
            return None
        return self.model.num_layers // (self.parallel.pipeline_model_parallel_size * layers)

    @property
    def sequence_multiple(self) -> int:
        """Every sample is padded to a multiple of this many tokens: context parallelism cuts it into 2 x CP chunks."""
        context = self.parallel.context_parallel_size
        return 1 if context == 1 else 2 * context

    @property
    def task(self) -> Task:
        """What the objective needs of data and model."""
        return TASKS[self.training.objective]

    @property
    def pack_tokens(self) -> int:
        """Maximum tokens of a micro-batch."""
        return self.training.micro_batch_size * self.task.sequences_per_sample * self.data.seq_length

    @property
    def pack_multiple(self) -> int:
        """A pack is padded to a multiple of this many tokens, so that each process's share has a shape its kernels take."""
        parallel, training = self.parallel, self.training
        if parallel.tp_comm_overlap:
            return self.pack_tokens  # its buffers have one size
        processes = parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
        share = FP8_MULTIPLES[training.fp8_recipe] if training.fp8_format else 1
        return math.lcm(processes * share, self.sequence_multiple)

    @property
    def prunes_last_layer(self) -> bool:
        """Whether the model returns the label rows alone."""
        training = self.training
        at_label_rows = self.task.has_label_tokens or not self.has_vocabulary_head
        return at_label_rows and training.fused_losses and training.prune_last_layer

    @property
    def has_scalar_head(self) -> bool:
        """Whether the model gives each sequence a reward of its own."""
        return self.task.head == "scalar"

    @property
    def has_vocabulary_head(self) -> bool:
        """Whether the loss needs the output layer."""
        return not self.has_scalar_head or self.training.sft_loss_weight > 0

    @property
    def label_rows_only(self) -> bool:
        """Whether the output weight serves at two rows alone, and the head norms the hidden rows."""
        training = self.training
        return self.task.head == "labels" and training.label_softmax == "two-token" and training.fused_losses

    def to_yaml(self) -> str:
        """The whole configuration as YAML, in sections and without access tokens; `parse --config` reads it back."""
        plain = {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }
        return redact(yaml.safe_dump(plain, sort_keys=False))

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML."""
        with write_atomically(path) as handle:
            handle.write(self.to_yaml())
