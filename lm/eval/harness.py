"""A backend for lm-evaluation-harness: any model that `lm.load` opens answers its tasks.

    import lm, lm_eval
    from lm.eval.harness import LmEvalModel

    model = LmEvalModel(lm.load("runs/mine"))
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

It needs the extra `[eval]`, and nothing else in the package imports it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.data.tokenizer import SubwordTokenizer
from lm.infer.decoding import KEY_TYPE
from lm.infer.generate import generate_until
from lm.infer.score import groups, loglikelihood_tokens, rows_at
from lm.models.encdec import EncoderDecoder

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "the backend needs lm-evaluation-harness, which is not installed: pip install 'lm[eval]'"
    ) from error

MAX_LENGTH = 2048  # Of a model without positions, as the harness assumes.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("lm")
class LmEvalModel(TemplateLM):
    """A loaded model as lm-evaluation-harness sees it.

    Tokens, cuts and windows are those of the harness's own `hf` backend, with one difference: a
    rolling perplexity does not predict a start token.
    """

    def __init__(
        self,
        loaded: Any,
        batch_size: int | str = 32,
        max_gen_toks: int = 256,
        seed: int = 0,
        **unused: Any,
    ):
        """Wraps a model.

        Args:
          loaded: what `lm.load` returns.
          batch_size: requests that are read at once; the harness may give it as a string.
          max_gen_toks: tokens of a reply, where a task does not say.
          seed: of what is sampled.
          unused: what `simple_evaluate` gives to every backend: device, max_batch_size.

        Raises:
          ValueError: if the model has no tokenizer, or is bidirectional.
        """
        super().__init__()
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.name or 'this model'} has no tokenizer to read tasks with")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is a number of rows, not {batch_size!r}")
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.batch_size, self.max_gen_toks, self.seed = int(batch_size), max_gen_toks, seed
        self.backend = "seq2seq" if isinstance(loaded.model, EncoderDecoder) else "causal"

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or the one that begins it where there is none."""
        ids = (self.tokenizer.eos_id, self.tokenizer.bos_id, self.tokenizer.pad_id)
        return next((id for id in ids if id is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos_id = self.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at once."""
        return self.loaded.model.max_length or MAX_LENGTH

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Returns the ids of a text, in which special tokens may be spelled out.

        Args:
          string: the text.
          add_special_tokens: whether it starts with bos (an encoder's: ends with eos); None does
            what the tokenizer says, and puts no bos before one that is written there.
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, SubwordTokenizer):
            ids = tokenizer.encode(string, special=True)
        else:
            ids = tokenizer.encode(string)
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
        if self.backend == "seq2seq":
            return ids if add_special_tokens is False or eos_id is None else [*ids, eos_id]
        if add_special_tokens is None:
            add_special_tokens = getattr(tokenizer, "starts", True) and ids[:1] != [bos_id]
        return [bos_id, *ids] if add_special_tokens and bos_id is not None else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        found = loglikelihood_tokens(
            self.loaded,
            [(context, continuation) for _, context, continuation in requests],
            batch_size=self.batch_size,
            dtype=self.loaded.dtype,
        )
        answers = [(likelihood.sum, likelihood.is_greedy) for likelihood in found]
        for (text, _, _), answer in zip(requests, answers):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns ln p of whole texts, read in windows that do not overlap in what they predict."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[owner] += nats
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns replies, each up to the first of its stop strings.

        Raises:
          ValueError: if a request has a setting that there is no such of here, or leaves no room
            for the context.
        """
        settings = [self._settings(dict(request.args[1])) for request in requests]
        # A reply depends on the number of its request, and not on the batch that it falls into.
        keys = jax.random.split(jax.random.key(self.seed, impl=KEY_TYPE), len(requests))
        replies = [""] * len(requests)
        for kind in {repr(each): each for each in settings}.values():
            mine = [index for index, each in enumerate(settings) if each == kind]
            prompts = [self._prompt(requests[index].args[0], kind["tokens"]) for index in mine]
            for group in groups(prompts, self.batch_size):
                numbers = [mine[row] for row in group]
                texts = self._generate(rows_at(prompts, group), keys[np.array(numbers)], kind)
                for number, text in zip(numbers, texts):
                    replies[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return replies

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the stop strings, the number of tokens and the sampler of a request."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until, tokens = settings.pop("until"), settings.pop("max_gen_toks")
        if not settings.pop("do_sample", False):
            settings["temperature"] = 0.0
        if unknown := settings.keys() - set(SAMPLING):
            raise ValueError(
                f"generation here has no {', '.join(sorted(unknown))}: leave it out of the task's "
                f"generation_kwargs, which may have until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}"
            )
        return {"until": handle_stop_sequences(until, None), "tokens": tokens, "sampler": settings}

    def _prompt(self, context: str, tokens: int) -> list[int]:
        """Returns the ids of a context, without those at its beginning that leave no room."""
        limit = self.loaded.model.max_length
        if limit is None:
            return self.tok_encode(context)
        room = limit if self.backend == "seq2seq" else limit - tokens
        if room < 1 or tokens >= limit:
            raise ValueError(
                f"{tokens} new tokens leave no room for a context in {limit} positions: give fewer "
                "max_gen_toks"
            )
        return self.tok_encode(context)[-room:]

    def _generate(
        self, prompts: Sequence[Sequence[int]], keys: jax.Array, kind: dict[str, Any]
    ) -> list[str]:
        """Returns the replies to one batch of prompts with the same settings."""
        is_source = self.backend == "seq2seq"
        eos_id = self.tokenizer.eos_id
        rows = generate_until(
            self.loaded.model,
            self.loaded.params,
            None if is_source else prompts,
            source=prompts if is_source else None,
            done=lambda row: any(text in self.tokenizer.decode(row) for text in kind["until"]),
            max_new_tokens=kind["tokens"],
            stop_ids=[] if eos_id is None else [eos_id],
            keys=keys,
            dtype=self.loaded.dtype,
            **kind["sampler"],
        )
        texts = [self.tokenizer.decode([id for id in row if id != eos_id]) for row in rows]
        return [postprocess_generated_text(text, kind["until"], None) for text in texts]

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as the model reads it.

        Without a generation prompt it ends where its last message does, to be continued.

        Raises:
          ValueError: if the tokenizer has no template, or it refuses the conversation.
        """
        if not hasattr(self.tokenizer, "apply_chat_template"):
            raise ValueError("this tokenizer has no chat template: evaluate without one")
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]
