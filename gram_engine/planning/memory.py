"""Peak memory of one process: parameters, gradients, optimizer state, activations, logits and temporaries, in bytes.

Activations are the tensors that autograd keeps for the backward pass, counted one by one (tests/test_plan.py compares the
count with autograd's).  The micro-batches in flight, the head's logits and the embedding's dense gradient do not peak at the
same time, so the peak is searched over the pipeline schedule.

Data parallelism enters through `shards`, context parallelism through the pack's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from gram_engine.config.schema import Config
from gram_engine.kernels.linear_cross_entropy import LOGITS_BYTES
from gram_engine.planning.pipeline_balance import stage_layers

GIB = 1 << 30


@dataclass(frozen=True)
class Engine:
    """Which implementation runs; the defaults are this engine on a GPU.

    local_layers: gram_engine's norms and rotary embedding instead of Transformer Engine's.
    fused_swiglu: autograd keeps only the activation's input, not its two factors as well (two more feed-forward widths).
    attention_by_sequence: attention runs on one sequence of a pack at a time, and the outputs are concatenated.
    gradient_bytes: bytes of one element of DDP's gradient buffer.
    logits_bytes: bytes of a chunk of logits, where --logits-chunk-size is not given.
    overhead_bytes: CUDA context, NCCL and cuBLAS buffers.
    overhead_fraction: fragmentation, as a fraction of all tensors.
    """

    local_layers: bool = False
    fused_swiglu: bool = True
    attention_by_sequence: bool = False
    gradient_bytes: int = 4
    logits_bytes: int = LOGITS_BYTES["cuda"]
    overhead_bytes: int = 4 * GIB
    overhead_fraction: float = 0.05


GPU = Engine()
CPU = Engine(
    local_layers=True,
    fused_swiglu=False,
    attention_by_sequence=True,
    logits_bytes=LOGITS_BYTES["cpu"],
    overhead_bytes=0,
    overhead_fraction=0.0,
)


@dataclass(frozen=True)
class Pack:
    """One micro-batch on one process: its tokens (the pack's, divided by CP) and its rows that run the output layer."""

    tokens: float
    rows: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    temporary: float
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def peak_memory(config: Config, stage: int, pack: Pack, microbatches: int, shards: int, engine: Engine = GPU) -> Memory:
    """Memory of a process of pipeline stage `stage` at its peak.

    Args:
        microbatches: micro-batches of one step on this process.
        shards: processes over which the distributed optimizer shards its state; 1 without it.
    """
    count, trained = parameter_count(config, stage), trained_count(config, stage)
    element = _element(config)
    main_parameters = 4 if config.training.bf16 else 0
    # FP8 without --fp8-param-gather keeps two 8-bit copies beside the weights; with it, in their place.
    copies = 2 * _matrices(config, stage) if config.training.fp8_format and not config.training.fp8_param_gather else 0
    states = dict(
        parameters=element * count + copies,
        gradients=engine.gradient_bytes * trained,
        optimizer=(8 + main_parameters) * trained / shards,
    )
    moments = _Moments(config, stage, pack, microbatches, engine).all()
    activations, logits, temporary = max(moments, key=sum)
    tensors = sum(states.values()) + activations + logits + temporary
    overhead = engine.overhead_bytes + engine.overhead_fraction * tensors
    return Memory(**states, activations=activations, logits=logits, temporary=temporary, overhead=overhead)


def parameter_count(config: Config, stage: int) -> int:
    """Parameters of a process of pipeline stage `stage`."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    stages = config.parallel.pipeline_model_parallel_size
    norms = 2 * model.hidden_size + (2 * model.kv_channels if model.qk_layernorm else 0)
    count = _matrices(config, stage) + stage_layers(config)[stage] * norms + _adapters(config, stage)
    vocabulary = config.padded_vocab_size // tp * model.hidden_size
    untied = model.untie_embeddings_and_output_weights
    if stage == 0:
        count += vocabulary
    if stage == stages - 1:
        count += model.hidden_size * (2 if config.has_scalar_head else 1)
        # With pipeline stages a tied weight exists twice, unless stage 2 borrows its two rows (model/reward_model.py).
        own = untied or (stages > 1 and not config.label_rows_only)
        count += vocabulary if config.has_vocabulary_head and own else 0
    return count


def trained_count(config: Config, stage: int) -> int:
    """Parameters of a process that have gradients and optimizer state; with LoRA only the adapters."""
    return parameter_count(config, stage) if config.model.lora_rank is None else _adapters(config, stage)


def _adapters(config: Config, stage: int) -> int:
    """Elements of LoRA's adapters (model/lora.py): rank x (inputs + outputs) of each linear layer's part on this process."""
    query, group, mlp = _columns(config)
    hidden = config.model.hidden_size
    sides = dict(linear_qkv=query + 2 * group, linear_proj=query, linear_fc1=2 * mlp, linear_fc2=mlp)
    width = sum(hidden + sides[name] for name in config.model.lora_modules)
    return stage_layers(config)[stage] * (config.model.lora_rank or 0) * width


def _matrices(config: Config, stage: int) -> int:
    """Elements of the layers' matrices."""
    query, group, mlp = _columns(config)
    return stage_layers(config)[stage] * config.model.hidden_size * (2 * query + 2 * group + 3 * mlp)


def layer_bytes(config: Config, tokens: float, engine: Engine = GPU) -> float:
    """Bytes that autograd keeps of one transformer layer, its input included, for `tokens` tokens on this process."""
    query, group, mlp = _columns(config)
    element, product = _element(config), _product(config)
    heads, context = config.model.num_attention_heads, config.parallel.context_parallel_size
    # Query and key after the rotary embedding, value, output and its log-normalisers.
    attention = element * (2 * query + 2 * group) + 4 * heads / config.parallel.tensor_model_parallel_size
    if engine.local_layers and context > 1:
        # Keys and values of all context-parallel processes; those of a process's first chunk occur twice.
        attention += element * 2 * group * (context - 0.5)
    elif engine.local_layers:
        attention += element * (query + group)  # the value is a view that keeps the whole projection alive
    if engine.attention_by_sequence:
        attention += element * query
    elif product != element:
        attention += product * query
    if config.model.qk_layernorm:
        attention += _head_norms(config, query, group, engine)
    activation = element * mlp * (2 if engine.fused_swiglu else 4) + product * mlp
    low_rank = element * (config.model.lora_rank or 0) * len(config.model.lora_modules)
    return tokens * (2 * norm_bytes(config, engine) + attention + activation + low_rank)


def norm_bytes(config: Config, engine: Engine) -> float:
    """Bytes per token that a norm and the matrix product after it keep: the norm's input, its output and its statistics."""
    share = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    # torch's norm keeps its input and, for its weight's gradient, the normalised input, both in fp32; Transformer Engine's
    # norm keeps only the input.
    kept = 8 if config.model.lora_rank is None else 4
    inside = kept if engine.local_layers else _element(config)
    return ((inside + _product(config)) * config.model.hidden_size + 4) / share


def pruned_layer_bytes(config: Config, pack: Pack, engine: Engine) -> float:
    """Bytes kept of the pruned last layer (model/label_rows.py): keys and values of all tokens, all else of label rows."""
    query, group, mlp = _columns(config)
    element = _element(config)
    tokens = norm_bytes(config, engine) + element * 3 * group
    weights = element * config.model.hidden_size * (query + 2 * group)
    return pack.tokens * tokens + weights + layer_bytes(config, pack.rows, engine)


def _head_norms(config: Config, query: float, group: float, engine: Engine) -> float:
    """Bytes per token kept by the norms of each head's query and key (Qwen3), their inputs included."""
    element = _element(config)
    statistics = 4 * (query + group) / config.model.kv_channels
    if not engine.local_layers:
        return element * query + statistics
    copies = 4 * (query + group) if element == 2 else 4 * query
    return copies + 4 * (query + group) + statistics


class _Moments:
    """Moments of a step at which memory may peak, each (activations, logits, temporary) in bytes beyond the states."""

    def __init__(self, config: Config, stage: int, pack: Pack, microbatches: int, engine: Engine):
        self.config, self.pack, self.engine = config, pack, engine
        parallel = config.parallel
        self.stage, self.stages = stage, parallel.pipeline_model_parallel_size
        self.microbatches = min(microbatches, 3 * self.stages)  # from there on the schedule repeats itself
        self.chunks = config.virtual_pipeline_size or 1
        self.layers = stage_layers(config)[stage] // self.chunks
        self.element = _element(config)
        self.share = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        self.row = self.element * config.model.hidden_size * pack.tokens / self.share
        self.recompute = config.training.recompute_granularity == "full"

    def all(self) -> list[tuple[float, float, float]]:
        moments = []
        kept = [self._kept(chunk) for chunk in range(self.chunks)]
        last = self.chunks - 1 if self.stage == self.stages - 1 else None
        live = 0.0
        for forward, chunk in schedule(self.stages, self.stage, self.chunks, self.microbatches):
            if forward:
                live += kept[chunk]
                if chunk == last:
                    moments.append((live, *self._head()))
                continue
            moments.append((live, 0.0, self._backward(chunk)))
            live -= kept[chunk]
            if chunk == 0 and self.stage == 0:
                moments.append((live, 0.0, self._embedding_gradient()))
        return moments

    def _kept(self, chunk: int) -> float:
        """Activations of one micro-batch in one chunk of layers."""
        config, engine = self.config, self.engine
        is_last = self._is_last(chunk)
        whole = self.layers - (1 if is_last and config.prunes_last_layer else 0)
        if self.recompute:
            blocks = -(-self.layers // config.training.recompute_num_layers)
            kept = blocks * self.row
        else:
            kept = whole * layer_bytes(config, self.pack.tokens, engine)
            kept += pruned_layer_bytes(config, self.pack, engine) if whole < self.layers else 0.0
        kept += self.element * config.model.kv_channels * self.pack.tokens  # cosines and sines
        if not is_last:
            kept += self.row  # the output that is sent to the next stage stays until its gradient arrives
        elif not config.label_rows_only:
            rows = self.pack.rows if config.task.needs_labels else self.pack.tokens
            kept += rows * norm_bytes(config, engine)
            kept += 2 * self.pack.rows * self.element * config.model.hidden_size  # rows that predict, and their gradient
        if engine.local_layers and self.element == 2 and not (self.stage == 0 and chunk == 0) and not self.recompute:
            kept += self.row  # the input from the previous stage; the norm keeps its own fp32 copy
        return kept

    def _is_last(self, chunk: int) -> bool:
        return self.stage == self.stages - 1 and chunk == self.chunks - 1

    def _head(self) -> tuple[float, float]:
        """(logits, other temporaries) of the loss."""
        config = self.config
        training = config.training
        if config.label_rows_only:
            return 0.0, 0.0
        tp = config.parallel.tensor_model_parallel_size
        width = config.padded_vocab_size // tp * self.element
        chunk = training.logits_chunk_size or max(self.engine.logits_bytes // width // 128, 1) * 128
        buffers = 1 if tp == 1 else 2
        gathered = self.element * config.model.hidden_size * self.pack.tokens if config.parallel.sequence_parallel else 0.0
        return buffers * min(chunk, self.pack.rows) * width, gathered

    def _backward(self, chunk: int) -> float:
        """Temporaries of a chunk's backward pass, which are largest in the last layer's MLP, while all activations are live."""
        _, _, mlp = _columns(self.config)
        hidden, tokens = self.config.model.hidden_size, self.pack.tokens
        if self._is_last(chunk) and self.config.prunes_last_layer and self.layers == 1:
            return 2 * self.row
        part = tokens * mlp * self.element
        weight = mlp * hidden * self.element if self.config.model.lora_rank is None else 0
        gradients = max(2 * part, part + weight)
        if self.share > 1:
            gradients += self.element * hidden * tokens  # the gathered pack
        recomputed = min(self.config.training.recompute_num_layers, self.layers) if self.recompute else 0
        return recomputed * layer_bytes(self.config, tokens, self.engine) + gradients + 2 * self.row

    def _embedding_gradient(self) -> float:
        if self.config.model.lora_rank is not None:
            return 0.0
        vocabulary = self.config.padded_vocab_size // self.config.parallel.tensor_model_parallel_size
        hidden = self.config.model.hidden_size
        return self.element * hidden * (vocabulary + self.pack.tokens)


def schedule(stages: int, stage: int, chunks: int, microbatches: int) -> list[tuple[bool, int]]:
    """megatron-core's order of passes on one pipeline stage: (is forward, chunk) for each micro-batch and chunk.

    1F1B starts with stages - stage - 1 warm-up forward passes.  The interleaved schedule sends groups of `stages`
    micro-batches through all chunks, and starts with 2 (stages - stage - 1) + (chunks - 1) stages warm-up passes.
    """
    total = microbatches * chunks
    warmup = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warmup = min(warmup, total)
    forward = [(True, number // stages % chunks) for number in range(total)]
    backward = [(False, chunks - 1 - chunk) for _, chunk in forward]
    order = forward[:warmup]
    for number in range(total - warmup):
        order += [forward[warmup + number], backward[number]]
    return order + backward[total - warmup :]


def _element(config: Config) -> int:
    return 2 if config.training.bf16 else 4


def _product(config: Config) -> int:
    """Bytes of an element of the input that a layer's matrix product keeps."""
    return 1 if config.training.fp8_format else _element(config)


def _columns(config: Config) -> tuple[float, float, float]:
    """Widths of query, of key (value is as wide) and of the MLP on one tensor-parallel process."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    return (
        model.num_attention_heads * model.kv_channels // tp,
        model.num_query_groups * model.kv_channels // tp,
        model.ffn_hidden_size // tp,
    )
