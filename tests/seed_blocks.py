"""What users have read: each code block and command of the three seeds, with its indentation restored.

The seeds are flattened text: indentation is lost and prose sticks to code.  A row says where the block stands, what
it says, and what must be filled in to run it: `before` defines the names that the seed leaves to the reader, and each
of `substitutions` replaces something that cannot be run as it stands (a provider's URL, an ellipsis, a path).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SEEDS = {
    "readme": "000_a65e2a7e52c2cb61.txt",
    "index": "001_d72181ddaa1fa218.txt",
    "quickstart": "002_41b329add6a6a944.txt",
}
SERVER = "SERVER_URL"
"""stands for the address of the test's own server"""


@dataclass(frozen=True)
class Block:
    """One block; `text` without its indentation is what lines `first` to `last` of the seed say."""

    name: str
    seed: str
    first: int
    last: int
    kind: Literal["python", "shell", "words"]
    """`words` are code inside a sentence: the text stands somewhere in those lines"""
    text: str
    substitutions: tuple[tuple[str, str], ...] = ()
    before: str = ""
    """Python that defines what the seed leaves to the reader"""
    pending: str = ""
    """how running it fails, because it needs what is not built yet; of `words`: a name that looplet lacks"""
    not_run: str = ""
    """why running it is not for a test"""
    lost: bool = False
    """the seed's text has lost the command; the surface page says what it was"""

    def runnable(self, server_url: str) -> str:
        """Return what to run."""
        text = self.text
        for old, new in self.substitutions:
            assert old in text, f"{self.name}: there is no {old!r} to replace"
            text = text.replace(old, new)
        return (self.before + text).replace(SERVER, server_url)


OLLAMA = (("http://127.0.0.1:11434/v1", SERVER),)
DEMO = (("/tmp/demo", "demo"),)

GREET = """\
from looplet import DefaultState, LoopConfig, OpenAIBackend, composable_loop, tool, tools_from

@tool
def greet(name: str) -> dict:
    "Greet someone by name."
    return {"greeting": f"Hello, {name}!"}

llm = OpenAIBackend.from_env()
tools = tools_from([greet], include_done=True)
task = {"goal": "Greet Alice and Bob, then finish."}
"""

README = (
    Block(
        "pitch", "readme", 29, 33, "python",
        """\
from looplet import composable_loop
for step in composable_loop(llm=llm, tools=tools, task=task, config=cfg, state=state):
    print(step.pretty()) # → "#1 ✓ search(query='…') → 12 items [182ms]"
    if step.tool_result.error:
        break # your loop, your control flow
""",
        before="""\
from looplet import DefaultState, LoopConfig, OpenAIBackend, tool, tools_from

@tool
def search(query: str) -> list:
    "Search."
    return [query] * 12

llm = OpenAIBackend.from_env()
tools = tools_from([search], include_done=True)
task, cfg, state = {"goal": "Find out."}, LoopConfig(max_steps=5), DefaultState(max_steps=5)
""",
    ),
    Block("install", "readme", 34, 34, "shell",
          "pip install looplet # core — zero third-party packages pulled in\n", not_run="needs a package index"),
    Block("install-openai", "readme", 35, 35, "shell",
          'pip install "looplet[openai]" # works with OpenAI, Ollama, Together, Groq, vLLM, …\n',
          not_run="needs a package index"),
    Block("install-anthropic", "readme", 36, 36, "shell",
          'pip install "looplet[anthropic]" # or Anthropic directly\n', not_run="needs a package index"),
    Block(
        "simple-story", "readme", 48, 49, "python",
        """\
for step in composable_loop(llm=llm, tools=tools, state=state, config=config, hooks=hooks):
    print(step.pretty())
""",
        before=GREET + "state, config, hooks = DefaultState(), LoopConfig(), []\n",
    ),
    Block("run-skill", "readme", 52, 52, "shell",
          'python -m looplet run ./skills/coder "Fix the tests" --workspace .\n',
          pending="there is no command 'run'"),
    Block("blueprint", "readme", 53, 53, "shell",
          "python -m looplet blueprint ./skills/coder --workspace .\n", pending="there is no command 'blueprint'"),
    Block("export-code", "readme", 54, 54, "shell",
          "python -m looplet export-code ./skills/coder coder_agent.py\n",
          pending="there is no command 'export-code'"),
    Block("compact-chain", "readme", 72, 72, "words", "compact_chain(Prune, Summarize, Truncate)"),
    Block("step-pretty", "readme", 74, 74, "words", "step.pretty()"),
    Block("provenance-sink", "readme", 75, 75, "words", "ProvenanceSinkdumps"),
    Block(
        "two-hooks", "readme", 132, 140, "python",
        """\
class RedactPII:
    def pre_prompt(self, state, log, ctx, step):
        return _scrub_emails(ctx) # mutates the next LLM prompt
class RetryFlakyTool:
    def pre_dispatch(self, state, log, tc, step):
        if tc.tool == "web_search" and state.last_error:
            return Deny("retry with backoff", retry=True)
for step in composable_loop(..., hooks=[RedactPII(), RetryFlakyTool()]):
    ...
""",
        substitutions=((" composable_loop(...,", " composable_loop(llm=llm, tools=tools, task=task,"),
                       ("    ...", "    print(step.pretty())")),
        before="""\
import re
from looplet import Deny, OpenAIBackend, ProvenanceSink, composable_loop, tool, tools_from

def _scrub_emails(text):
    return re.sub(r"[\\w.+-]+@[\\w.-]+[.]\\w+", "[email]", text)

ran = []

@tool
def web_search(query: str) -> str:
    "Search the web."
    ran.append(query)
    if len(ran) == 1:
        raise ConnectionError("the line to bob@example.com is down")
    return "ask carol@example.com"

sink = ProvenanceSink("traces/two-hooks")
llm = sink.wrap_llm(OpenAIBackend.from_env())
tools = tools_from([web_search], include_done=True)
task = {"goal": "Write to alice@example.com."}
""",
    ),
    Block("shipped-gates", "readme", 141, 141, "words", "ApprovalHook, PermissionHook"),
    Block("shipped-checkpoints", "readme", 141, 141, "words", "CheckpointHook", pending="CheckpointHook"),
    Block("shipped-context", "readme", 141, 141, "words", "ContextPressureHook, ThresholdCompactHook,ProvenanceSink"),
    Block("shipped-observers", "readme", 141, 141, "words", "TracingHook, MetricsHook, EvalHook",
          pending="TracingHook"),
    Block(
        "first-agent", "readme", 144, 159, "python",
        '''\
from looplet import BaseToolRegistry, OpenAIBackend, composable_loop
from looplet.tools import register_done_tool
llm = OpenAIBackend.from_env(model="gpt-4o-mini") # reads OPENAI_API_KEY etc
tools = BaseToolRegistry()
@tools.tool
def greet(name: str) -> dict:
    """Greet someone by name."""
    return {"greeting": f"Hello, {name}!"}
register_done_tool(tools)
for step in composable_loop(
    llm=llm,
    tools=tools,
    task={"goal": "Greet Alice and Bob, then finish."},
    max_steps=5,
):
    print(step.pretty())
''',
    ),
    Block(
        "ollama", "readme", 163, 165, "shell",
        """\
OPENAI_BASE_URL=http://127.0.0.1:11434/v1 \\
OPENAI_API_KEY=ollama OPENAI_MODEL=llama3.1 \\
python -m looplet.examples.hello_world
""",
        substitutions=OLLAMA,
    ),
    Block("approval", "readme", 172, 173, "words",
          "You need the loop to pause for human approval, then resume where it left off when approval arrives."),
    Block("hello", "readme", 185, 185, "shell",
          "python -m looplet.examples.hello_world # 30-line starter\n"),
    Block("hello-scripted", "readme", 186, 186, "shell",
          "python -m looplet.examples.hello_world --scripted # no model required\n"),
    Block("coding-agent", "readme", 187, 187, "shell",
          'python -m looplet.examples.coding_agent "implement fizzbuzz" # bash/read/write/edit/grep\n',
          pending="No module named looplet.examples.coding_agent"),
    Block("coding-agent-trace", "readme", 188, 188, "shell",
          "python -m looplet.examples.coding_agent --trace ./traces/ # save full trajectory\n",
          pending="No module named looplet.examples.coding_agent"),
    Block("coding-agent-scripted", "readme", 189, 189, "shell",
          'python -m looplet.examples.coding_agent "implement add" --scripted --workspace /tmp/demo\n',
          substitutions=DEMO, pending="No module named looplet.examples.coding_agent"),
    Block("data-agent-clean", "readme", 190, 190, "shell",
          "python -m looplet.examples.data_agent --clean # approval + compact + checkpoints\n",
          pending="No module named looplet.examples.data_agent"),
    Block("data-agent-resume", "readme", 191, 191, "shell",
          "python -m looplet.examples.data_agent --resume # resume from last checkpoint\n",
          pending="No module named looplet.examples.data_agent"),
    Block("data-agent-scripted", "readme", 192, 192, "shell",
          "python -m looplet.examples.data_agent --scripted --auto-approve # no model required\n",
          pending="No module named looplet.examples.data_agent"),
    Block("list-bundles", "readme", 194, 194, "shell",
          "python -m looplet list-bundles examples/coder --json\n", pending="there is no command 'list-bundles'"),
    Block("run-coder", "readme", 195, 195, "shell",
          'python -m looplet run examples/coder/skill "Create a tiny add function with tests" --scripted '
          "--workspace /tmp/demo\n",
          substitutions=DEMO, pending="there is no command 'run'"),
    Block("export-coder", "readme", 196, 196, "shell",
          "python -m looplet export-code examples/coder/skill /tmp/coder_agent.py # exact local wrapper\n",
          substitutions=(("/tmp/coder_agent.py", "coder_agent.py"),), pending="there is no command 'export-code'"),
    Block("package", "readme", 197, 197, "shell",
          "python -m looplet package my_agent:build ./skills/my-agent --name my-agent "
          '--description "Run my agent."\n',
          pending="there is no command 'package'"),
    Block("wrap-skill", "readme", 198, 198, "shell",
          "python -m looplet wrap-claude-skill ./claude-skills/pdf ./skills/pdf\n",
          pending="there is no command 'wrap-claude-skill'"),
    Block(
        "dep-doctor", "readme", 205, 207, "shell",
        """\
OPENAI_BASE_URL=http://127.0.0.1:11434/v1 \\
OPENAI_API_KEY=ollama OPENAI_MODEL=llama3.1 \\
python examples/dep_doctor/agent.py /path/to/project
""",
        substitutions=(*OLLAMA, ("/path/to/project", "examples/dep_doctor/demo_project")),
    ),
    Block(
        "dep-doctor-scripted", "readme", 208, 209, "shell",
        """\
# No model required: deterministic local dogfood run
python examples/dep_doctor/agent.py examples/dep_doctor/demo_project --scripted
""",
    ),
    Block(
        "dogfood-hello", "readme", 212, 213, "shell",
        """\
# More no-model dogfood runs
python -m looplet.examples.hello_world --scripted
""",
    ),
    Block("dogfood-ollama", "readme", 214, 214, "shell",
          "python -m looplet.examples.ollama_hello --scripted\n",
          pending="No module named looplet.examples.ollama_hello"),
    Block("dogfood-git", "readme", 215, 215, "shell",
          "python examples/git_detective/agent.py . --scripted\n", pending="examples/git_detective/agent.py"),
    Block("dogfood-threats", "readme", 216, 216, "shell",
          "python examples/threat_intel/agent.py --scripted\n", pending="examples/threat_intel/agent.py"),
    Block("dogfood-coder", "readme", 217, 217, "shell",
          'python examples/coder/agent.py "Create a tiny add function with tests" --scripted\n',
          pending="examples/coder/agent.py"),
    Block("dogfood-coding-agent", "readme", 218, 218, "shell",
          'python -m looplet.examples.coding_agent "Implement add" --scripted --workspace /tmp/demo\n',
          substitutions=DEMO, pending="No module named looplet.examples.coding_agent"),
    Block("dogfood-data-agent", "readme", 219, 219, "shell",
          "python -m looplet.examples.data_agent --scripted --auto-approve --clean\n",
          pending="No module named looplet.examples.data_agent"),
    Block("pin", "readme", 240, 240, "words", "looplet>=0.1.8,<0.2"),
)  # fmt: skip

INDEX = (
    Block("runtime-checkable", "index", 57, 57, "words", "@runtime_checkablehook methods"),
    Block("redact", "index", 61, 61, "words", "redact=scrubs PII before the provider sees it"),
    Block("toolspec", "index", 64, 64, "words", "ToolSpec"),
    Block("print-pretty", "index", 67, 67, "words", "print(step.pretty())"),
    Block(
        "difference", "index", 69, 76, "python",
        """\
for step in composable_loop(
    llm=llm, tools=tools, task=task,
    hooks=[BudgetCap(10_000), Redactor()],
):
    if step.tool_call.tool == "delete":
        if not approve(step): # (1)
            break
    log(step) # (2)
""",
        before="""\
from looplet import BudgetCap, OpenAIBackend, Redactor, composable_loop, tool, tools_from

deleted, seen = [], []

@tool
def look(name: str) -> str:
    "Look at something."
    return f"{name} belongs to alice@example.com"

@tool
def delete(name: str) -> str:
    "Delete something."
    deleted.append(name)
    return "gone"

def approve(step):
    return step.tool_call.args["name"] == "copy"

log = seen.append
llm = OpenAIBackend.from_env()
tools = tools_from([look, delete], include_done=True)
task = {"goal": "Clean up; questions go to bob@example.com."}
""",
    ),
    Block(
        "cartridge", "index", 82, 86, "shell",
        """\
# Load the workspace; pass --workspace to point at the project to audit.
OPENAI_BASE_URL=http://127.0.0.1:11434/v1 \\
OPENAI_API_KEY=ollama OPENAI_MODEL=llama3.1 \\
python -c "from looplet import cartridge_to_preset; \\
p = cartridge_to_preset('examples/dep_doctor.cartridge', runtime={'workspace': '/path/to/project'})"
""",
        substitutions=(*OLLAMA, ("/path/to/project", "examples/dep_doctor/demo_project")),
        pending="cannot import name 'cartridge_to_preset'",
    ),
    Block(
        "dogfood-hello", "index", 94, 95, "shell",
        """\
# More dogfood — load each cartridge and run a scripted loop.
python -m looplet.examples.hello_world --scripted
""",
    ),
    Block("dogfood-ollama", "index", 96, 96, "shell",
          "python -m looplet.examples.ollama_hello --scripted\n",
          pending="No module named looplet.examples.ollama_hello"),
    Block("dogfood-coding-agent", "index", 97, 97, "shell",
          'python -m looplet.examples.coding_agent "Implement add" --scripted --workspace /tmp/demo\n',
          substitutions=DEMO, pending="No module named looplet.examples.coding_agent"),
    Block("dogfood-data-agent", "index", 98, 98, "shell",
          "python -m looplet.examples.data_agent --scripted --auto-approve --clean\n",
          pending="No module named looplet.examples.data_agent"),
)  # fmt: skip

QUICKSTART = (
    Block("install", "quickstart", 11, 11, "shell", "pip install .", lost=True, not_run="needs a package index"),
    Block(
        "endpoint", "quickstart", 17, 19, "shell",
        """\
export OPENAI_BASE_URL=https://api.openai.com/v1 # or Ollama, Groq, Together, vLLM, …
export OPENAI_API_KEY=sk-…
export OPENAI_MODEL=gpt-5.5
""",
        substitutions=(("https://api.openai.com/v1", SERVER), ("sk-…", "sk-any")),
    ),
    Block("hello", "quickstart", 20, 20, "shell", "python -m looplet.examples.hello_world", lost=True),
    Block("hello-output", "quickstart", 21, 21, "words", "three lines of #1 greet(name='…') → {…} [Xms] trace"),
    Block(
        "first-loop", "quickstart", 24, 42, "python",
        """\
from looplet import (
    composable_loop, LoopConfig, DefaultState,
    OpenAIBackend, tool, tools_from,
)
llm = OpenAIBackend(base_url="https://api.openai.com/v1",
                    api_key="sk-...", model="gpt-5.5")
@tool(description="Search the docs.")
def search(query: str) -> dict:
    return {"results": [f"result for {query}"]}
tools = tools_from([search], include_done=True)
# Run. You own the iteration.
for step in composable_loop(
    llm=llm,
    tools=tools,
    state=DefaultState(max_steps=5),
    config=LoopConfig(max_steps=5),
    task={"goal": "What is looplet?"},
):
    print(step.pretty())
""",
        substitutions=(("https://api.openai.com/v1", SERVER),),
    ),
    Block(
        "hook", "quickstart", 49, 64, "python",
        '''\
from looplet import HookDecision
class StepBudget:
    """Cap the loop at N productive steps; block ``done()`` until
    we've gathered enough evidence."""
    def __init__(self, max_productive: int) -> None:
        self.cap = max_productive
        self.productive = 0
    def post_dispatch(self, state, session_log, tool_call, tool_result, step_num):
        if not tool_result.error and tool_call.tool != "done":
            self.productive += 1
    def should_stop(self, state, step_num, new_entities):
        if self.productive >= self.cap:
            return HookDecision(stop="step_budget_exceeded")
        return False
# ... then in composable_loop(...):
hooks=[StepBudget(max_productive=8)]
''',
    ),
    Block("router-1", "quickstart", 65, 66, "words", "wire a BackendRouter (it owns the token counters)"),
    Block("router-2", "quickstart", 66, 67, "words", "router.total_input_tokens / router.total_output_tokens"),
    Block(
        "trajectory", "quickstart", 70, 76, "python",
        """\
from looplet import ProvenanceSink
sink = ProvenanceSink(dir="traces/run_1", redact=lambda s: s.replace("secret", "[REDACTED]"))
llm = sink.wrap_llm(OpenAIBackend(base_url="https://api.openai.com/v1",
                                  api_key="sk-...", model="gpt-5.5"))
for step in composable_loop(llm=llm, tools=tools, hooks=[sink.trajectory_hook()], ...):
    print(step.pretty())
sink.flush() # writes trajectory.json + steps/*.json + call_*.txt
""",
        substitutions=(("https://api.openai.com/v1", SERVER), (", ...)", ", task=task)")),
        before="""\
from looplet import OpenAIBackend, composable_loop, tool, tools_from

@tool
def search(query: str) -> dict:
    "Search the docs."
    return {"results": [f"the secret of {query}"]}

tools = tools_from([search], include_done=True)
task = {"goal": "Tell me the secret."}
""",
    ),
    Block("show", "quickstart", 77, 77, "shell", "python -m looplet show traces/run_1", lost=True),
    Block(
        "evals", "quickstart", 79, 85, "python",
        """\
from looplet import eval_mark
@eval_mark("verdict")
def eval_returns_answer(ctx):
    return "answer" in ctx.final_output
@eval_mark("budget")
def eval_stopped_cleanly(ctx):
    return ctx.completed # stop_reason == "done"
""",
    ),
    Block("eval", "quickstart", 86, 86, "shell",
          "looplet eval traces/ --evals eval_my_agent.py --threshold 0.7 -v", lost=True),
    Block("run-skill", "quickstart", 89, 89, "shell",
          'python -m looplet run ./skills/coder "Fix the tests" --workspace .\n',
          pending="there is no command 'run'"),
    Block("blueprint", "quickstart", 90, 90, "shell",
          "python -m looplet blueprint ./skills/coder --workspace .\n", pending="there is no command 'blueprint'"),
    Block("export-code", "quickstart", 91, 91, "shell",
          "python -m looplet export-code ./skills/coder coder_agent.py\n",
          pending="there is no command 'export-code'"),
    Block(
        "package", "quickstart", 93, 95, "shell",
        """\
python -m looplet package my_agent:build ./skills/my-agent \\
    --name my-agent \\
    --description "Run my custom looplet agent."
""",
        pending="there is no command 'package'",
    ),
    Block("wrap-skill", "quickstart", 96, 96, "shell",
          "python -m looplet wrap-claude-skill ./claude-skills/pdf ./skills/pdf", lost=True,
          pending="there is no command 'wrap-claude-skill'"),
    Block("sub-agent", "quickstart", 104, 106, "words",
          "A sub-agent is a function that calls composable_loop and returns a value — then you expose it as a "
          "ToolSpec."),
    Block("planner", "quickstart", 106, 107, "words",
          "A planner is a hook that inspects session_log and returns an InjectContext(...) in pre_prompt."),
    Block("memory", "quickstart", 107, 108, "words",
          "A memory manager is StaticMemorySource plus a compact_service."),
)  # fmt: skip

ROWS = (*README, *INDEX, *QUICKSTART)
BLOCKS = {f"{block.seed}:{block.name}": block for block in ROWS}
