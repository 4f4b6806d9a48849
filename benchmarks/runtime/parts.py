"""What the rivals train: consecutive layers of the same model as plain modules, from the same initial weights."""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from skippipe.config.experiment import Experiment
from skippipe.data.samples import SampleOrder
from skippipe.data.token_cache import open_cache
from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.model.full_model import build_full


class Part(nn.Module):
    """Layers [first, last), with the embedding before the first and norm and head behind the last.

    B samples, T tokens, D hidden size, V vocabulary: (B, T) or (B, T, D) in, (B, T, D) or (B, T, V) out.
    """

    def __init__(self, model: LlamaForCausalLM, first: int, last: int) -> None:
        super().__init__()
        self.embedding = model.model.embed_tokens if first == 0 else nn.Identity()
        self.layers = nn.ModuleList(model.model.layers[first:last])
        self.rotary = model.model.rotary_emb
        ends = last == model.config.num_hidden_layers
        self.head = nn.Sequential(model.model.norm, model.lm_head) if ends else nn.Identity()

    def forward(self, given: Tensor) -> Tensor:
        """Run the part on one microbatch."""
        hidden = self.embedding(given)  # (B, T, D)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)  # (1, T)
        rotation = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotation)
        output: Tensor = self.head(hidden)
        return output


def make_parts(experiment: Experiment, count: int) -> Iterator[Part]:
    """Yield the model cut into `count` parts of costs as equal as whole layers allow."""
    model = build_full(experiment_model(experiment), experiment.seed, torch.device("cpu"))
    first = 0
    for last in cuts(experiment, count):
        yield Part(model, first, last)
        first = last


def cuts(experiment: Experiment, count: int) -> tuple[int, ...]:
    """Return behind which layer each of `count` parts ends; the costliest part is as cheap as can be."""
    training = experiment.training
    cost = model_cost(experiment_model(experiment), training.micro_batch_size, training.sequence_length, torch.float32)
    head = cost.loss_flop / (1 + cost.backward_to_forward) / cost.layer_forward_flop

    def costliest(ends: tuple[int, ...]) -> tuple[float, int]:
        sizes = [last - first for first, last in zip((0, *ends), (*ends, cost.num_layers), strict=True)]
        return max(*sizes[:-1], sizes[-1] + head), sizes[-1]

    inner = min(combinations(range(1, cost.num_layers), count - 1), key=costliest)
    return *inner, cost.num_layers


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, T, V) against labels (B, T)."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_optimizer(experiment: Experiment, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch's AdamW as in the experiment, at a constant learning rate; decay on matrices only."""
    held, options = list(parameters), experiment.optimizer
    groups = [
        {"params": [parameter for parameter in held if parameter.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [parameter for parameter in held if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        fused=options.fused is True,
    )


class Batches:
    """The microbatches of the steps, in the same order as in the project's own training."""

    def __init__(self, experiment: Experiment) -> None:
        self._training = experiment.training
        self._order = SampleOrder(
            open_cache(experiment.data, experiment.seed),
            seed=experiment.seed,
            sequence_length=experiment.training.sequence_length,
        )

    def of_step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return (input_ids, labels), (B, T) each, of all microbatches of a step."""
        count = self._training.num_microbatches
        return [
            self._order.batch(step, microbatch, count, self._training.micro_batch_size) for microbatch in range(count)
        ]
