"""The smallest agent: one tool, one loop, one line for each step.

    python -m looplet.examples.hello_world --scripted

Without `--scripted`, the model is that of OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL.
"""

import argparse

from looplet import ConfigError, MockLLMBackend, OpenAIBackend, composable_loop, tool, tools_from

SCRIPT = [f'{{"tool": "greet", "args": {{"name": "{name}"}}}}' for name in ("Alice", "Bob", "Carol")]
SCRIPT += ['{"tool": "done", "args": {"answer": "Alice, Bob and Carol are greeted."}}']


@tool
def greet(name: str) -> dict[str, str]:
    """Greet someone by name."""
    return {"greeting": f"Hello, {name}!"}


def main() -> None:
    """Run the agent."""
    parser = argparse.ArgumentParser(description="Let an agent greet three people.")
    parser.add_argument("--scripted", action="store_true", help="take the replies from a script, not from a model")
    parser.add_argument("--max-steps", type=int, default=5)
    parser.add_argument("--base-url", help="of an OpenAI-compatible API  [OPENAI_BASE_URL]")
    parser.add_argument("--model", help="its name  [OPENAI_MODEL]")
    args = parser.parse_args()
    tools = tools_from([greet], include_done=True)
    task = {"goal": "Greet Alice, Bob and Carol, each with a call of its own, then finish."}
    try:
        env = {"model": args.model, "base_url": args.base_url}
        llm = MockLLMBackend(SCRIPT) if args.scripted else OpenAIBackend.from_env(**env)
        for step in composable_loop(llm=llm, tools=tools, task=task, max_steps=args.max_steps):
            print(step.pretty())
    except ConfigError as error:
        parser.error(f"{error} (with --scripted it needs no model)")


if __name__ == "__main__":
    main()
