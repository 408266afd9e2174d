"""What comes back beside an answer's text and tokens: the prompt's echo and log-probabilities."""

from __future__ import annotations

from dataclasses import replace

from polygraft.core.output import RequestOutput
from polygraft.engine.prompts.adapter_prompts import AdapterPrompts
from polygraft.engine.sequences.sequence import Generation
from polygraft_types.answers import TokenLogprob


class Answers:
    """Completes the outputs of generations that ask for more."""

    def __init__(self, prompts: AdapterPrompts) -> None:
        self._prompts = prompts

    def describe(self, generation: Generation) -> None:
        """Add texts to the new likelihoods. Called after every step, since doing a whole prompt's at once
        would take longer than a step."""
        if generation.untold:
            generation.described += self._prompts.of(generation.stack).texts.describe(generation.untold)
            generation.untold.clear()

    def complete(self, generation: Generation, output: RequestOutput) -> RequestOutput:
        """Add what the request asked for and has not been told; the echo goes with its first output."""
        self.describe(generation)
        logprobs = tuple(generation.described)
        generation.described.clear()
        if not generation.echo_due:
            return replace(output, logprobs=logprobs) if logprobs else output
        generation.echo_due = False
        prompt_ids = generation.token_ids[: generation.prompt_tokens]
        if generation.request.response.wants_logprobs:
            first = prompt_ids[0]
            logprobs = (TokenLogprob(first, self._prompts.of(generation.stack).texts(first), None), *logprobs)
        return replace(
            output, text=generation.echo + output.text, prompt_ids=tuple(prompt_ids), logprobs=logprobs
        )
