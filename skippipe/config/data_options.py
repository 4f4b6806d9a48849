"""The `data:` section of an experiment. Light to import: no data library is loaded here."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from skippipe.config.section import Section

DataSource = Literal["text", "jsonl", "parquet", "huggingface", "python_stdlib"]


class DataOptions(Section):
    """Where text comes from and how it becomes tokens."""

    source: DataSource
    """text, jsonl and parquet read local files; huggingface a dataset of the hub or a local directory of one."""
    paths: tuple[str, ...] = Field(default=(), examples=[["corpus/*.jsonl"]])
    """Files, directories or glob patterns, for text, jsonl and parquet, or URLs of them (https, s3 and others, by
    fsspec). A relative path starts at the file that names it."""
    dataset: str | None = Field(default=None, examples=["HuggingFaceFW/fineweb-edu"])
    """Name of a dataset on the hub, or a local directory, for huggingface."""
    subset: str | None = Field(default=None, examples=["sample-10BT"])
    """Configuration of the dataset, for huggingface; its default one where not given."""
    split: str = "train"
    """Split of the dataset to read, for huggingface; the validation text is taken out of it."""
    revision: str | None = Field(default=None, examples=["v1.4.0"])
    """Branch, tag or commit of the dataset on the hub, for huggingface; a commit is the same text for ever."""
    text_key: str = "text"
    """Key or column that holds the text."""
    tokenizer: str = Field(default="bytes", examples=["bpe:4096"])
    """bytes; bpe:SIZE, trained on the corpus; or a Hugging Face name or directory."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out, chosen by their content."""
    max_documents: Annotated[int, Field(ge=1)] | None = Field(default=None, examples=[1_000_000])
    """Stop reading the corpus after so many documents; null reads all of them."""
    max_bytes: Annotated[int, Field(ge=1)] | None = Field(default=None, examples=[2_000_000])
    """Stop reading the corpus after so many bytes of text; null reads all of it."""
    cache_dir: str | None = Field(default=None, examples=["cache/tokens"])
    """Folder of token caches; SKIPPIPE_CACHE_DIR or the user's cache folder where not given."""
    same_on_all_hosts: bool = True
    """Whether all hosts that begin microbatches have to have the same text; false lets each one have its own."""

    @model_validator(mode="after")
    def _source_has_a_place(self) -> Self:
        if self.source in {"text", "jsonl", "parquet"} and not self.paths:
            raise ValueError(f"source {self.source} needs paths: [...] (files, directories or patterns)")
        if self.source == "huggingface" and self.dataset is None:
            raise ValueError("source huggingface needs dataset: NAME (or a local directory)")
        if self.tokenizer.startswith("bpe:") and not re.fullmatch(r"bpe:[0-9]{1,9}", self.tokenizer):
            raise ValueError(f"tokenizer {self.tokenizer!r}: expected bpe:SIZE, such as bpe:4096")
        if self.tokenizer.startswith("bpe:") and not self.same_on_all_hosts:
            raise ValueError(
                f"tokenizer {self.tokenizer} is trained on the text, which differs with same_on_all_hosts: false; name "
                "a tokenizer that all hosts have"
            )
        return self
