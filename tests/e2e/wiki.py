"""A wiki that speaks MCP: the official SDK's server, with a tool for everything that a session can carry."""

import threading
from typing import Annotated, Any

import anyio
import anyio.to_thread
from e2e.serving import Served
from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from pydantic import BaseModel, Field

PATIENCE_S = 10
PIXEL = bytes.fromhex("89504e470d0a1a0a")


class Page(BaseModel):
    title: str
    words: int


class Confirmation(BaseModel):
    sure: bool


def _ask(page: str) -> Elicit[Confirmation]:
    return Elicit(f"Rename {page}?", Confirmation)


# The tools. Their names and types are what the server lists.


def search_pages(query: str) -> list[Page]:
    return [Page(title=f"About {query}", words=3), Page(title=f"{query}: “naïve” ✓", words=7)]


def read_page(page: str, region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    return f"{page} as in {region}"


def show_logo() -> Image:
    return Image(data=PIXEL, format="png")


def read_broken_page() -> str:
    raise ToolError("the page is broken")


def rename_page(page: str, answer: Annotated[Confirmation, Resolve(_ask)]) -> str:
    return f"{page} is renamed: {answer.sure}"


async def add_page(ctx: Context[Any, Any]) -> str:
    await ctx.session.send_tool_list_changed()  # heard on the GET stream, until 2025-11-25
    await ctx.notify_tools_changed()  # heard on subscriptions/listen, since 2026-07-28
    return "added"


def delete_page(page: str) -> str:
    return f"{page} is gone"


def purge_history() -> str:
    return "all history is gone"


def home() -> str:
    return "home"


class Memory(EventStore):
    """Every event of every stream, so that a client can resume one."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []

    async def store_event(self, stream_id: str, message: Any) -> str:
        self._events.append((stream_id, message))
        return str(len(self._events) - 1)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        stream = self._events[int(last_event_id)][0]
        for number, (stream_id, message) in enumerate(self._events):
            if stream_id == stream and number > int(last_event_id) and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream


class Wiki(Served):
    """Its tool `rebuild_index` reports progress, and goes on once `released` is set, by who heard of the progress."""

    def __init__(self, certificate: Any = None) -> None:
        self.released = threading.Event()
        self.cancelled = threading.Event()
        server = MCPServer("wiki", instructions="Search before you write.", version="1.0")
        for tool in (search_pages, read_page, show_logo, read_broken_page, self.rebuild_index, rename_page, add_page):
            server.tool()(tool)
        server.tool()(delete_page)
        server.tool()(purge_history)
        server.resource("wiki://home")(home)
        super().__init__(server.streamable_http_app(event_store=Memory()), certificate)

    def called(self) -> list[Any]:
        """The params of every `tools/call` that arrived."""
        posts = [each.json() for each in self.arrived if each.method == "POST"]
        return [post["params"] for post in posts if post.get("method") == "tools/call"]

    async def rebuild_index(self, ctx: Context[Any, Any]) -> str:
        await ctx.report_progress(1, 3, "reading")
        try:
            heard = await anyio.to_thread.run_sync(self.released.wait, PATIENCE_S, abandon_on_cancel=True)
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        await ctx.report_progress(2, 3, "writing")
        await ctx.report_progress(3, 3, "done")
        return "rebuilt" if heard else "nobody heard of the progress"
