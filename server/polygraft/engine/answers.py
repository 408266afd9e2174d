"""What comes back beside an answer's text and tokens: the prompt's echo and log-probabilities."""

from __future__ import annotations

from dataclasses import replace

from tokenizers import Tokenizer

from polygraft.engine.logprobs import TokenTexts
from polygraft.engine.request import RequestOutput, TokenLogprob
from polygraft.engine.sequence import Generation


class Answers:
    """Completes the outputs of generations that ask for more."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)

    def complete(self, generation: Generation, output: RequestOutput) -> RequestOutput:
        """Add what the request asked for and has not been told; the echo goes with its first output."""
        logprobs = self.texts.describe(generation.untold)
        generation.untold.clear()
        if not generation.echo_due:
            return replace(output, logprobs=logprobs) if logprobs else output
        generation.echo_due = False
        request = generation.request
        prompt_ids = generation.token_ids[: generation.prompt_tokens]
        if isinstance(request.prompt, str):
            text = request.prompt
        else:
            text = self._tokenizer.decode(prompt_ids, skip_special_tokens=True)
        if request.response.wants_logprobs:
            first = prompt_ids[0]
            logprobs = (TokenLogprob(first, self.texts(first), None), *logprobs)
        return replace(output, text=text + output.text, prompt_ids=tuple(prompt_ids), logprobs=logprobs)
