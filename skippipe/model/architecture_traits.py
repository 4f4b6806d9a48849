"""What each architecture calls its parts: the one table that knows how Hugging Face's decoders differ.

Names are those of the modules and configurations in transformers. What all decoders share (input and output
embeddings, `layer_types`, the number of layers, heads and key-value groups) is asked of transformers itself.
"""

from dataclasses import dataclass

from torch import nn

from skippipe.errors import ConfigError, InputError, did_you_mean


@dataclass(frozen=True)
class ArchitectureTraits:
    """Where the parts of a decoder are; the defaults are those of Llama, which most others follow."""

    layers: str = "layers"
    """The list of decoder layers in the base model."""
    final_norm: str = "norm"
    """The norm after the last layer, in the base model."""
    rotation: str = "rotary"
    """What the name of a module has in it that rotates queries and keys; every stage needs it."""
    position_embedding: str | None = None
    """The module in the base model that embeds positions, where they are learned."""
    embedding_dropout: str | None = None
    """The dropout behind the embedding, in the base model."""
    embedding_factor: str | None = None
    """The number in the base model that its forward multiplies embeddings by."""
    attention: str = "self_attn"
    """The attention in a layer."""
    feed_forward: str = "mlp"
    """The feed-forward block in a layer."""
    experts: str = "experts"
    """What holds the experts' weights, in the feed-forward block of a mixture."""
    residual_reader: str = "post_attention_layernorm"
    """The module in a layer whose input is the residual stream between attention and feed-forward block."""
    parallel_residual: str | None = None
    """The switch in a layer that puts the block beside the attention, so that nothing reads the stream between them."""
    feed_forward_width: str = "intermediate_size"
    """The option for the width of the block, of one expert in a mixture; four hidden sizes where it is not set."""
    num_experts: str | None = None
    """The option for the experts of a layer, of mixtures."""
    dropout_options: tuple[str, ...] = ("attention_dropout",)
    """Off unless asked for: dropout would make the same run differ between one process and several."""
    reads_again: bool = False
    """Whether generation reads a text again where longrope takes other factors; transformers does so for some alone."""
    older_options: tuple[str, ...] = ("rope_theta", "rope_scaling")
    """Names that a published config.json has for options which are called otherwise now; transformers takes both."""
    undeclared_options: tuple[str, ...] = ()
    """Options that the model reads and its configuration class does not declare."""
    fan_in_fan_out: bool = False
    """Whether weights of linear layers are stored as (inputs, outputs); peft's name for it."""
    eager_because: str = ""
    """Why its attention is eager, where sdpa cannot compute it."""

    def find_feed_forward(self, layer: nn.Module) -> str | None:
        """Return the name of a layer's feed-forward block; None where it has none apart from the rest."""
        return self.feed_forward if isinstance(getattr(layer, self.feed_forward, None), nn.Module) else None

    def feed_forward_name(self, layer: nn.Module) -> str:
        """Return the name of a layer's feed-forward block; raise `InputError` where it has none to skip."""
        name = self.find_feed_forward(layer)
        if name is None:
            raise InputError(
                f"layers of type {type(layer).__name__} have no feed-forward block apart from the rest; "
                "choose a policy that leaves out whole layers"
            )
        return name

    def find_residual_reader(self, layer: nn.Module) -> nn.Module | None:
        """Return the module whose input is the residual stream between attention and feed-forward block.

        None where the block stands beside the attention: then the stream without it is the layer's output less its
        own. Raises `InputError` where the layer has no such module.
        """
        if self.parallel_residual is not None and getattr(layer, self.parallel_residual):
            return None
        reader = getattr(layer, self.residual_reader, None)
        if not isinstance(reader, nn.Module):
            raise InputError(
                f"layers of type {type(layer).__name__}: the norm before the feed-forward block is not known"
            )
        return reader


TRAITS = {
    "llama": ArchitectureTraits(),
    "qwen2": ArchitectureTraits(undeclared_options=("head_dim",)),
    "qwen3": ArchitectureTraits(),
    "mistral": ArchitectureTraits(),
    "gpt2": ArchitectureTraits(
        layers="h",
        attention="attn",
        final_norm="ln_f",
        position_embedding="wpe",
        embedding_dropout="drop",
        residual_reader="ln_2",
        feed_forward_width="n_inner",
        dropout_options=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        fan_in_fan_out=True,
        older_options=(),
    ),
    "gemma2": ArchitectureTraits(
        residual_reader="pre_feedforward_layernorm", eager_because="sdpa would leave out the soft cap"
    ),
    "gemma3_text": ArchitectureTraits(
        residual_reader="pre_feedforward_layernorm",
        older_options=("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"),
    ),
    "phi3": ArchitectureTraits(
        dropout_options=("attention_dropout", "resid_pdrop", "embd_pdrop"),
        undeclared_options=("head_dim",),
        reads_again=True,
        older_options=("rope_theta", "rope_scaling", "partial_rotary_factor"),
    ),
    "olmo2": ArchitectureTraits(residual_reader="mlp", undeclared_options=("head_dim",)),  # the norm follows the block
    "gpt_neox": ArchitectureTraits(
        attention="attention",
        final_norm="final_layer_norm",
        embedding_dropout="emb_dropout",
        parallel_residual="use_parallel_residual",
        dropout_options=("attention_dropout", "hidden_dropout"),
        older_options=("rotary_emb_base", "rotary_pct", "rope_scaling"),
    ),
    "granite": ArchitectureTraits(embedding_factor="embedding_multiplier", undeclared_options=("head_dim",)),
    "mixtral": ArchitectureTraits(num_experts="num_local_experts"),
    "qwen3_moe": ArchitectureTraits(
        num_experts="num_experts", feed_forward_width="moe_intermediate_size", undeclared_options=("head_dim",)
    ),
}
"""By `model_type`; tests hold every entry to transformers, and its split into stages to the bit."""

ARCHITECTURES = tuple(TRAITS)

SHARED_STATE = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "zamba", "zamba2")
"""Layers of these use keys, values or weights of other layers, so a stage cannot run alone."""


def traits_of(architecture: str, where: str = "model") -> ArchitectureTraits:
    """Return the traits of `architecture`, a `model_type`.

    Raises `ConfigError`, beginning with `where`, for one that cannot be split into stages.
    """
    if architecture in TRAITS:
        return TRAITS[architecture]
    if architecture in SHARED_STATE:
        reason = "cannot be split into stages because its layers share state with each other"
    else:
        reason = f"cannot be split into stages{did_you_mean(architecture, TRAITS)}"
    raise ConfigError(f"{where}: {architecture!r} {reason}; supported: {', '.join(TRAITS)}")
