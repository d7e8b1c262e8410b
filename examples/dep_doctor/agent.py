"""Audit the dependencies of a project: `python examples/dep_doctor/agent.py [PATH] [--scripted]`.

The agent itself is `looplet/examples/dep_doctor/agent.py`: system prompt, tools, one gate.  With OPENAI_BASE_URL,
OPENAI_API_KEY and OPENAI_MODEL set, that model decides each call; without, or with --scripted, rules do.
"""

from looplet.cli.demo import demo_command

if __name__ == "__main__":
    demo_command(prog_name="agent.py")
