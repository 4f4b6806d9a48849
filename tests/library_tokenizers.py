"""Small tokenizers in the files of transformers, of the kinds that published models have."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = ["river stone cloud lamp\n  quiet  green seven", "def f(x):\n    return x\n", "éü漢字🙂 naïve 0 1 2 3"] * 9
END = "<|endoftext|>"


def byte_level(folder: Path, *, bos: bool = False, chat: bool = False, last_id: int | None = None) -> Any:
    """Write and return a byte-level encoding; `last_id` puts one of its tokens far behind the others."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    given = {"eos_token": END}
    if chat:
        core.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
        given = {"eos_token": "<|im_end|>"}
    if bos:
        core.add_special_tokens([AddedToken("<bos>", special=True)])
        first = core.token_to_id("<bos>")
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", first)])
        given |= {"bos_token": "<bos>"}
    if last_id is not None:
        content = json.loads(core.to_str())
        content["model"]["vocab"]["v"] = last_id
        core = Tokenizer.from_str(json.dumps(content))
    return _saved(core, folder, given)


def prepended(folder: Path) -> Any:
    """Write and return an encoding that begins every text with a space, as Llama's first ones do."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    without_first_space = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), *without_first_space])
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    return _saved(core, folder, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _saved(core: Tokenizer, folder: Path, given: dict[str, str]) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=core, **given)
    made.save_pretrained(folder)
    return made
