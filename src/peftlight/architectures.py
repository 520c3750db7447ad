"""The one home of names in architectures: what their attention and MLP layers are called.

The defaults are those of HF PEFT's LoRA table wherever it has an entry. Names are ends of module paths, at a dot.
They may name more than one model has: T5 has `wi`, or `wi_0` and `wi_1`.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Names of the linear layers of one family of models."""

    default: tuple[str, ...] | str
    """What a strategy adapts when nothing is asked for; a string is a regular expression for the whole path."""
    attention: tuple[str, ...]
    """All linear layers of the attention blocks; empty: the family has no attention."""
    mlp: tuple[str, ...]
    """All linear layers of the feed-forward blocks; empty: they are not linear layers (experts in one tensor, say)."""


_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")
_TWO = ("fc1", "fc2")
_QKV = ("query", "key", "value")
_QKV_PROJ = ("query_proj", "key_proj", "value_proj")
_LIN = ("q_lin", "k_lin", "v_lin", "out_lin")
_MLA = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_QWEN3_5 = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "linear_attn.out_proj")
_QWEN3_NEXT = ("in_proj_qkvz", "in_proj_ba", "linear_attn.out_proj")
_RWKV = ("attention.key", "attention.value", "attention.receptance", "attention.output")
_RWKV_MLP = ("feed_forward.key", "feed_forward.value", "feed_forward.receptance")
_RWKV7 = ("r_proj", "k_proj", "v_proj", "o_proj")
_CONFORMER = ("linear_q", "linear_k", "linear_v", "linear_out")
_TIMESFORMER = ("attention.output.dense", "temporal_attention.output.dense", "temporal_dense")
_PROPHET_MLP = ("feed_forward.intermediate", "feed_forward.output")

_LLAMA = Architecture(("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), _GATED)
_EXPERTS = replace(_LLAMA, mlp=())
_UNGATED = replace(_LLAMA, mlp=("up_proj", "down_proj"))
_GLM = replace(_LLAMA, mlp=_FUSED)
_VIT = replace(_LLAMA, mlp=_TWO)
_DEEPSEEK = Architecture(_MLA, (*_MLA, "o_proj"), _GATED)
_BERT = Architecture(("query", "value"), (*_QKV, "attention.output.dense"), ("intermediate.dense", "output.dense"))
_BART = Architecture(("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"), _TWO)
_BIGBIRD = Architecture((*_BERT.default, *_BART.default), (*_QKV, "self_attn.output", *_BART.attention), _TWO)
_WAV2VEC2 = replace(_BART, mlp=("intermediate_dense", "output_dense"))
_BLIP = Architecture(
    ("query", "value", "qkv"),
    (*_BERT.attention, "crossattention.output.dense", "qkv", "projection"),
    (*_BERT.mlp, *_TWO),
)
_BLIP2_MLP = (*_TWO, "intermediate_query.dense", "output_query.dense")
_T5 = Architecture(("q", "v"), ("q", "k", "v", "o"), ("wi", "wi_0", "wi_1", "wo"))
_GPT2 = Architecture(("c_attn",), ("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"))
_NEOX = Architecture(("query_key_value",), ("query_key_value", "attention.dense"), ("dense_h_to_4h", "dense_4h_to_h"))
_BLOOM = replace(_NEOX, attention=("query_key_value", "self_attention.dense"))

_FAMILIES: tuple[tuple[Architecture, str], ...] = (
    # Decoders whose names are those of Llama.
    (_LLAMA, "llama mistral ministral ministral3 stablelm gemma gemma2 gemma3_text gemma3n_text gemma4_text"),
    (_LLAMA, "qwen2 qwen3 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3_vl_text olmo olmo2 olmo3 granite granite_swa"),
    (_LLAMA, "cohere cohere2 smollm3 helium seed_oss ernie4_5 ernie4_5_moe exaone4 bitnet internlm3 glm4_moe cwm"),
    (_LLAMA, "glm4v_moe_text hunyuan_v1_dense llama4_text mllama_text_model vaultgemma t5gemma"),
    (_EXPERTS, "mixtral qwen3_moe qwen3_vl_moe_text olmoe granitemoe granitemoeshared phimoe gpt_oss minimax_m2"),
    (_EXPERTS, "flex_olmo"),
    (_UNGATED, "nemotron arcee apertus"),
    (_GLM, "glm glm4 glm4v_text"),
    (_DEEPSEEK, "deepseek_v2 deepseek_v3 minicpm3"),
    (replace(_LLAMA, attention=(*_LLAMA.attention, *_QWEN3_5)), "qwen3_5_text qwen3_5_moe_text"),
    (replace(_LLAMA, attention=(*_LLAMA.attention, *_QWEN3_NEXT)), "qwen3_next"),
    (replace(_LLAMA, default=r".*language_model\..*\.(q_proj|v_proj)"), "gemma4"),
    (replace(_LLAMA, mlp=(*_GATED, *_TWO)), "llama4"),
    (replace(_UNGATED, default=("q_proj", "k_proj", "v_proj", "o_proj")), "nemotron_h"),
    (replace(_LLAMA, mlp=("c_fc", "c_proj")), "starcoder2"),
    (replace(_LLAMA, attention=_BART.attention, mlp=("w1", "w2", "w3")), "lfm2"),
    (Architecture(("qkv_proj",), ("qkv_proj", "o_proj"), _FUSED), "phi3"),
    # Decoders that kept names of their own.
    (replace(_GPT2, attention=(*_GPT2.attention, "q_attn", "crossattention.c_proj")), "gpt2 gpt-sw3 gpt_bigcode"),
    (_GPT2, "imagegpt openai-gpt"),
    (_NEOX, "gpt_neox gpt_neox_japanese"),
    (_BLOOM, "bloom falcon"),
    (replace(_NEOX, attention=("query_key_value", "self_attn.dense")), "persimmon"),
    (_BART, "opt xglm biogpt"),
    (replace(_BART, mlp=("c_fc", "c_proj")), "gpt_neo"),
    (replace(_BART, mlp=("fc_in", "fc_out")), "gptj"),
    (Architecture(("qkv_proj",), ("qkv_proj", "out_proj"), ("fc_in", "fc_out")), "codegen"),
    (Architecture(("Wqkv",), ("Wqkv", "out_proj"), ("up_proj", "down_proj")), "mpt"),
    (Architecture(("q_proj", "v_proj", *_TWO), ("q_proj", "k_proj", "v_proj", "self_attn.dense"), _TWO), "phi"),
    (Architecture(("key", "value", "receptance", "output"), _RWKV, _RWKV_MLP), "rwkv"),
    (Architecture(("in_proj",), (), ()), "mamba mamba2 falcon_mamba"),
    # Decoders whose code comes with their weights: transformers does not have them.
    (_BLOOM, "chatglm RefinedWeb RefinedWebModel"),
    (Architecture(("c_proj", "c_attn"), ("c_attn", "attn.c_proj"), ("c_fc", "c_fc2", "mlp.c_proj")), "btlm"),
    (Architecture((*_RWKV7, "key", "value"), _RWKV7, ("key", "value")), "rwkv7"),
    # Encoders of text.
    (_BERT, "bert roberta xlm-roberta electra layoutlm camembert data2vec-text ernie rembert roformer megatron-bert"),
    (_BERT, "splinter layoutlmv3 nystromformer canine tapas big_bird bert-generation roberta-prelayernorm esm xmod"),
    (_BERT, "xlm-roberta-xl roc_bert markuplm visual_bert mobilebert"),
    (replace(_BERT, attention=(*_BERT.attention, "query_global", "key_global", "value_global")), "longformer"),
    (replace(_BERT, attention=(*_BERT.attention, "w2e_query", "e2w_query", "e2e_query")), "luke"),
    (replace(_BERT, attention=(*_QKV, "attention.dense"), mlp=("ffn", "ffn_output")), "albert"),
    (replace(_BERT, default=("q", "v"), attention=("q", "k", "v", "o")), "mpnet"),
    (replace(_BERT, default=("in_proj",), attention=("in_proj", "attention.output.dense")), "deberta"),
    (Architecture(("query_proj", "value_proj"), (*_QKV_PROJ, "attention.output.dense"), _BERT.mlp), "deberta-v2"),
    (Architecture(("q_lin", "v_lin"), _LIN, ("lin1", "lin2")), "distilbert xlm flaubert"),
    (Architecture(("Wqkv",), ("Wqkv", "attn.Wo"), ("Wi", "mlp.Wo")), "modernbert"),
    (replace(_LLAMA, attention=("q_proj", "k_proj", "v_proj", "attn.Wo"), mlp=("Wi", "mlp.Wo")), "modernbert-decoder"),
    (_LLAMA, "eurobert nomic_bert gte"),
    (_VIT, "jina_embeddings_v3"),
    # Sequence to sequence.
    (_T5, "t5 mt5 umt5 longt5 udop"),
    (replace(_T5, mlp=("wi", "wo")), "switch_transformers"),
    (_BART, "bart mbart pegasus marian blenderbot blenderbot-small m2m_100 nllb-moe plbart fsmt trocr"),
    (_BIGBIRD, "bigbird_pegasus"),
    (replace(_BIGBIRD, attention=(*_BIGBIRD.attention, "query_global", "key_global", "value_global")), "led"),
    (Architecture(("query_proj", "value_proj"), (*_QKV_PROJ, "out_proj"), _PROPHET_MLP), "prophetnet"),
    # Images, and images with text.
    (_VIT, "vit deit beit dinov2 dinov2_with_registers swin vit_mae vit_msn vivit ijepa segformer"),
    (_UNGATED, "dinov3_vit"),
    (_BERT, "videomae yolos swinv2 donut-swin mobilevit data2vec-vision vilt"),
    (replace(_BERT, default=("qkv",), attention=("qkv", *_TIMESFORMER)), "timesformer"),
    (Architecture(("pwconv1", "pwconv2"), (), ("pwconv1", "pwconv2")), "convnext convnextv2"),
    (_BART, "clip clip_text_model clip_vision_model siglip siglip2 siglip_vision_model clipseg owlvit owlv2"),
    (_BLIP, "blip"),
    (replace(_BLIP, default=_BART.default, attention=(*_BLIP.attention, *_BART.attention), mlp=_BLIP2_MLP), "blip-2"),
    # Sound.
    (_BART, "whisper speech_to_text"),
    (_VIT, "audio-spectrogram-transformer moonshine"),
    (_WAV2VEC2, "wav2vec2 hubert wavlm data2vec-audio unispeech unispeech-sat sew speecht5"),
    (replace(_WAV2VEC2, default=("linear_q", "linear_v"), attention=_CONFORMER), "wav2vec2-bert wav2vec2-conformer"),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {name: family for family, names in _FAMILIES for name in names.split()}
"""The architecture of each `model.config.model_type`."""
