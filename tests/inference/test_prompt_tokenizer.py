"""What is told of the text behind a prompt, where a tokenizer reads the first token of a text otherwise."""

import json
from pathlib import Path

import library_tokenizers
import pytest
import torch
from tiny_decoders import tiny
from torch import nn
from transformers import AutoModelForCausalLM

from skippipe import TextOptions, generate_texts, load_model
from skippipe.cli.main import main

PROMPT = "river"
SAID = ["▁", "gr", "\n", "▁de", "qu"]
"""Tokens of which two begin with a space, one of them in a new line."""


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says `SAID` behind `PROMPT`: its layers are idle, and its head knows what follows each token."""
    folder = tmp_path_factory.mktemp("reciter")
    tokenizer = library_tokenizers.prepended(folder)
    said = tokenizer.convert_tokens_to_ids(SAID)
    assert tokenizer.unk_token_id not in said
    follows = dict(zip([tokenizer(PROMPT)["input_ids"][-1], *said[:-1]], said, strict=True))
    config = tiny("llama", vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        nn.init.orthogonal_(embedding)
        nn.init.zeros_(head)
        for token, following in follows.items():
            head[following] = embedding[token]
    model.save_pretrained(folder)
    return folder


def printed(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(folder), "--device", "cpu", "--max-new-tokens", str(len(SAID)), *arguments])
    assert not stop.value.code
    return capsys.readouterr().out


def test_the_space_behind_a_prompt_is_told_everywhere(reciter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(SAID).replace("▁", " ")
    (told,) = generate_texts(load_model(reciter, device="cpu"), [PROMPT], TextOptions(max_new_tokens=len(SAID))).texts
    assert told == text
    assert printed(reciter, capsys, "--prompt", PROMPT) == f"{PROMPT}{text}\n"
    both = printed(reciter, capsys, "--prompt", PROMPT, "--prompt", f"seven {PROMPT}")
    assert both == f"{PROMPT}{text}\n\nseven {PROMPT}{text}\n"
    as_json = json.loads(printed(reciter, capsys, "--prompt", PROMPT, "--json"))
    assert as_json["texts"] == [{"prompt": PROMPT, "text": text}]
