"""What the safetensors of a Hugging Face directory hold: names and types of their tensors, and signs of a quantisation.

Only headers are read. A quantised file is found by its configuration, by the types of its tensors and by their names,
since each of the three is missing in some published directories.
"""

import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from skippipe.errors import InputError
from skippipe_scheduler.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PLAIN_TYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CAUSAL_MASKS = re.compile(r"(attn|attention)\.(masked_)?bias$|position_ids$|inv_freq$")
"""Tensors that older releases of transformers stored and that follow from the configuration."""

QUANTISED_NAMES = {
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "bitsandbytes, 8 bit": r"\.(SCB|weight_format)$",
    "bitsandbytes, 4 bit": r"\.(absmax|nested_absmax|quant_map|nested_quant_map)$|\.quant_state\.",
    "compressed-tensors": r"\.weight_(packed|shape|zero_point|global_scale|g_idx)$",
    "FP8 with scales": r"\.((weight|input|output|activation|k|v|q|kv)_scale(_inv|_2)?|qscale_\w+|scale_weight)$",
    "MXFP4": r"_(blocks|scales)$",
    "EXL2": r"\.(q_weight|q_scale|q_scale_max|q_invperm|q_groups)$",
    "EXL3": r"\.(trellis|suh|svh)$",
    "QuIP#": r"\.(Qidxs|SU|SV)$",
    "AQLM": r"\.(codes|codebooks)$",
    "HQQ": r"\.(W_q|Wq_packed)$",
    "quanto": r"\.(_data|_scale|_shift)$",
    "MLX": r"\.(scales|biases)$",
}
"""Names that only quantised weights have, by what writes them; the first that fits is named."""

QUANTISED_TYPES = {
    r"F8": "8-bit floats",
    r"F[46]": "floats of less than 8 bits",
    r"[IU](8|16|32|64)": "integers",
    r"BOOL": "bits",
}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors that transformers reads: one file, or those of the index.

    Raises `InputError` where there are none, the index cannot be read or a shard is not there.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} beside config.json")
    weight_map = read_json(index, InputError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: it has no weight_map, which says in which file each tensor is")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{index}: it names {name!r}, and {folder} has no such file; fetch all files again")
    return [folder / name for name in names]


def stored_types(folder: Path) -> dict[str, str]:
    """Return the type of every stored tensor, by name, as safetensors calls it.

    Raises `InputError` where a file cannot be read, and where two files have tensors of one name.
    """
    types: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as reason:
            raise InputError(f"{path}: cannot be loaded ({reason}); fetch the file again") from None
        twice = sorted(found.keys() & types.keys())
        if twice:
            raise InputError(f"{path}: {name_some(twice)}: another file of {folder} has it too; remove one of them")
        types |= found
    return types


def check_not_quantised(folder: Path) -> dict[str, str]:
    """Return what is stored; raise `InputError` naming the quantisation where the weights are not plain numbers."""
    named = _quantisation_of_config(folder / "config.json")
    types = stored_types(folder)
    sign = _quantised_tensor(types)
    if named or sign:
        raise InputError(
            f"{folder}: the weights are quantised: {'; '.join(filter(None, (named, sign)))}; these are not read, "
            "take those from which they were made (bfloat16, float16 or float32), or a .gguf file"
        )
    return types


def dtype_that_holds(types: Mapping[str, str]) -> torch.dtype:
    """Return the narrowest dtype in which no stored tensor of the model is rounded: fp32 for bf16 and fp16 together."""
    plain = {kind for key, kind in types.items() if not CAUSAL_MASKS.search(key)} & PLAIN_TYPES.keys()
    return reduce(torch.promote_types, (PLAIN_TYPES[kind] for kind in plain)) if plain else torch.float32


def name_some(names: list[str], most: int = 8) -> str:
    """Return the names in one line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _quantisation_of_config(path: Path) -> str:
    content = read_json(path, InputError)
    for key in ("quantization_config", "compression_config", "quantization"):
        entry = content.get(key)
        if entry:
            known = {"quant_method", "fmt", "bits"} & set(entry) if isinstance(entry, dict) else set()
            told = {name: entry[name] for name in sorted(known)} or entry
            return f"config.json has {key} {json.dumps(told)[:200]}"
    return ""


def _quantised_tensor(types: Mapping[str, str]) -> str:
    for quantisation, pattern in QUANTISED_NAMES.items():
        named = next((key for key in sorted(types) if re.search(pattern, key)), None)
        if named is not None:
            return f"{named!r} is a tensor of {quantisation}"
    for key, kind in sorted(types.items()):
        if kind not in PLAIN_TYPES and not CAUSAL_MASKS.search(key):
            words = next((words for start, words in QUANTISED_TYPES.items() if re.match(start, kind)), "no numbers")
            return f"{key!r} is stored as {kind} ({words})"
    return ""
