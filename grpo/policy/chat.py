"""From a question to token ids and back: the tokenizer, its chat template, and the tokens that end an answer."""

from __future__ import annotations

import contextlib
from typing import Any

from grpo.errors import UserError
from grpo.policy.sources import load_from_hub, resolve_model


def load_tokenizer(model: str, *, chat_template: bool = True) -> Any:
    """The model's tokenizer. One without a pad token pads with EOS: masks are made from lengths, never from pad ids.

    chat_template: whether the tokenizer must have one.
    Raises UserError where there is no tokenizer, or where it lacks the chat template."""
    from transformers import AutoTokenizer

    folder = resolve_model(model)
    tokenizer: Any = load_from_hub("tokenizer", model, lambda: AutoTokenizer.from_pretrained(folder))
    if chat_template and not tokenizer.chat_template:
        raise UserError(
            f"--model {model}: the tokenizer has no chat template, which says how to ask the model a question; "
            "take the model's instruct version, or put a chat_template.jinja into its folder"
        )
    tokenizer.clean_up_tokenization_spaces = False  # a reward must see what the model said, spaces before stops too
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_chat(tokenizer: Any, question: str, *, system: str | None = None, prefill: str = "") -> list[int]:
    """Token ids of the whole prompt for one question: system message, question, and the start of the assistant's turn.

    prefill: first words of the answer, put into the assistant's mouth."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return encode_messages(tokenizer, [*messages, {"role": "user", "content": question}], prefill=prefill)


def encode_messages(tokenizer: Any, messages: list[dict[str, str]], *, prefill: str = "") -> list[int]:
    """Token ids of a chat, up to where the assistant's answer begins. See `encode_chat`.

    No special token is added to the template's own: it places the one BOS itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + prefill, add_special_tokens=False)["input_ids"]


def check_context(config: Any, max_prompt_tokens: int, max_completion_tokens: int) -> None:
    """Raise UserError where the longest sequence has more tokens than the model was made for.

    config: the model's transformers config."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_prompt_tokens + max_completion_tokens > context:
        raise UserError(
            f"--max-prompt-tokens {max_prompt_tokens} and --max-completion-tokens {max_completion_tokens} are more "
            f"than the {context} tokens that the model was made for (max_position_embeddings); lower them"
        )


def stop_ids(model: str, tokenizer: Any) -> list[int]:
    """Every token id that ends a completion: those of generation_config.json, the tokenizer's EOS, and the token with
    which the chat template closes an assistant's turn.

    Models have up to three, and a file's metadata can name the wrong one. Where one is missing here, the model talks on
    after its answer, and every answer looks truncated."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    with contextlib.suppress(OSError):  # not every model has a generation_config.json
        eos: Any = GenerationConfig.from_pretrained(resolve_model(model)).eos_token_id
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.all_special_ids:
            ids.add(after[0])
    return sorted(ids)
