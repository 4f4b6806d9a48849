"""A slow and obvious model that runs parts of itself: one position at a time, no cache, masks written by hand.

At each position the token passes the layers it is to run. A layer sees the inputs that it got at this position and at
all positions before, and computes everything anew. Nothing of `skippipe.inference` is used.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from skippipe.model.layer_halves import HalfLayer, LayerOrHalf

Sets = Callable[[int], Sequence[LayerOrHalf]]
"""Layers that run at a position, or halves of them."""


class SlowModel:
    """Layers of a Hugging Face model, each taken apart into its attention and its feed-forward block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.base = model.base_model
        self.kind = model.config.model_type
        self.layers = self.base.h if self.kind == "gpt2" else self.base.layers

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], sets: Sets, rule: "FfnRule | None" = None) -> Tensor:
        """Return the logits after each token, (T, V)."""
        inputs: list[list[Tensor]] = [[] for _ in self.layers]
        results = []
        for position, token in enumerate(tokens):
            hidden = self.embed(token, position)  # (D,)
            skips_left = 0
            for layer in sets(position):
                if isinstance(layer, HalfLayer):
                    hidden = self.run_half(layer, hidden, inputs[layer.layer])
                    continue
                index = layer
                inputs[index].append(hidden)
                assert len(inputs[index]) == position + 1, "a layer came back"
                middle = self.attend(index, torch.stack(inputs[index]))  # (D,)
                if rule is not None and skips_left > 0:
                    skips_left -= 1
                    hidden = middle
                    rule.skipped.append((position, index))
                    continue
                hidden = middle + self.feed(index, middle)
                if rule is not None and rule.starts_skipping(position, index, middle, hidden):
                    skips_left = min(rule.span, rule.last - index - 1)
            results.append(self.head(hidden))
        return torch.stack(results)

    def run_half(self, half: HalfLayer, hidden: Tensor, inputs: list[Tensor]) -> Tensor:
        """Return the residual stream behind one block of a layer, (D,); `inputs` are those of its attention."""
        if half.block == "feed_forward":
            return hidden + self.feed(half.layer, hidden)
        inputs.append(hidden)
        return self.attend(half.layer, torch.stack(inputs))

    def greedy(self, prompt: Sequence[int], count: int, sets: Sets, rule: "FfnRule | None" = None) -> list[int]:
        """Return `count` tokens, each the likeliest after all before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, sets, rule)[-1].argmax()))
        return tokens[len(prompt) :]

    def embed(self, token: int, position: int) -> Tensor:
        row: Tensor = self.model.get_input_embeddings()(torch.tensor(token))
        return row + self.base.wpe.weight[position] if self.kind == "gpt2" else row

    def attend(self, index: int, inputs: Tensor) -> Tensor:
        """Return the residual stream of the last position after the layer's attention: (T, D) -> (D,)."""
        layer, rows = self.layers[index], inputs.unsqueeze(0)  # (1, T, D)
        mask = self.mask(index, len(inputs))
        if self.kind == "gpt2":
            added: Tensor = layer.attn(layer.ln_1(rows), attention_mask=mask)[0]
            return (rows + added)[0, -1]
        turned = self.base.rotary_emb(rows, torch.arange(len(inputs)).unsqueeze(0))
        attended: Tensor = layer.self_attn(
            layer.input_layernorm(rows), position_embeddings=turned, attention_mask=mask
        )[0]
        if self.kind == "gemma2":
            attended = layer.post_attention_layernorm(attended)
        return (rows + attended)[0, -1]

    def feed(self, index: int, middle: Tensor) -> Tensor:
        """Return what the layer's feed-forward block adds: (D,) -> (D,)."""
        layer, row = self.layers[index], middle.view(1, 1, -1)
        if self.kind == "gpt2":
            fed: Tensor = layer.mlp(layer.ln_2(row))
        elif self.kind == "gemma2":
            fed = layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(row)))
        else:
            fed = layer.mlp(layer.post_attention_layernorm(row))
        return fed[0, 0]

    def head(self, hidden: Tensor) -> Tensor:
        norm = self.base.ln_f if self.kind == "gpt2" else self.base.norm
        logits: Tensor = self.model.get_output_embeddings()(norm(hidden))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def mask(self, index: int, length: int) -> Tensor:
        """Return 0 where a position sees another and minus infinity elsewhere, (1, 1, T, T)."""
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        seen = distance >= 0
        if (getattr(self.model.config, "layer_types", None) or [""] * 99)[index] == "sliding_attention":
            seen &= distance < self.model.config.sliding_window
        return torch.zeros(length, length).masked_fill(~seen, float("-inf")).view(1, 1, length, length)


class FfnRule:
    """When feed-forward blocks are skipped: after one in layers [first, last) that hardly turned the token."""

    def __init__(self, *, first: int, last: int, warm_up: int, threshold: float, span: int) -> None:
        self.first, self.last, self.warm_up, self.threshold, self.span = first, last, warm_up, threshold, span
        self.skipped: list[tuple[int, int]] = []

    def starts_skipping(self, position: int, layer: int, before: Tensor, after: Tensor) -> bool:
        if position < self.warm_up or not self.first <= layer < self.last:
            return False
        return float(functional.cosine_similarity(before, after, dim=0)) >= self.threshold
