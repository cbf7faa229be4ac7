"""llama.cpp's own HTTP server (PyPI: xllamacpp) over a Hugging Face folder of a LLaMA model, in float32.

`python -m tests.support.llama_cpp_server FOLDER GGUF` writes GGUF, serves it until standard input ends, and prints its address.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' name of a tensor, without "model.layers.LAYER." and ".weight" -> GGUF's."""
NORMAL, CONTROL = 1, 3


def write_gguf(folder: Path, path: Path) -> None:
    """The model and tokenizer of SmolLM2's folder as a GGUF file."""
    from gguf import GGUFWriter, SpecialVocab
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([CONTROL if word in special else NORMAL for word in words])
    writer.add_add_bos_token(False)
    SpecialVocab(folder, load_merges=True).add_to_gguf(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        *layer, own = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if name.startswith("model.layers."):
            kind = own.rsplit(".", 1)[-1]
            if kind in heads:  # GGUF has the two rows of a rotary pair next to each other
                tensor = tensor.view(heads[kind], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            name = f"blk.{layer[0]}.{NAMES[own]}.weight"
        else:
            name = f"{NAMES[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: str) -> None:
    """Serve until standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = 8192, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
    params.warmup = False
    server = xllamacpp.Server(params)
    print(f"\naddress: {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    serve(sys.argv[2])
