"""Whether transformers takes over all that a GGUF file holds: it leaves out tensors whose names it does not know."""

from pathlib import Path

from transformers import PreTrainedModel

from skippipe.checkpoint.huggingface.stored_tensors import name_some
from skippipe.errors import InputError
from skippipe.model.architecture import num_experts


def check_all_used(path: Path, model: PreTrainedModel) -> None:
    """Raise `InputError` naming the tensors of the file that are not in `model`, which was read from it.

    The factors of a rotation are such: in safetensors they follow from the configuration. Names alone do not decide,
    since those of experts differ: the file must also hold more numbers than the model.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    key = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    stored = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    if key is None or sum(stored.values()) <= sum(parameter.numel() for parameter in model.parameters()):
        return
    names = get_tensor_name_map(key, model.config.num_hidden_layers)
    used = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    neutral = {tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_") and (tensor.data == 1).all()}
    experts = {name for name in stored if "_exps." in name} if num_experts(model.config) else set()
    unused = sorted(stored.keys() - used - neutral - experts)
    if unused:
        raise InputError(
            f"{path}: the file has tensors that transformers does not read: {name_some(unused)}; without them "
            "the model is another one: import the safetensors that it was made from"
        )
