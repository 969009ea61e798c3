"""A client of running ComfyUI servers: any workflow, queued, followed to its end, its files fetched.

    graph.py      a workflow file -> the graph that a server takes, with inputs and settings filled in
    convert.py    the form that ComfyUI's editor saves -> that graph
    companions.py the files that a mesh file refers to, which have to travel with it
    server.py     one server over HTTP
    websocket.py  its messages
    job.py        one job on one server: queue, follow, cancel
    files.py      what a server offers for download -> files in a folder, and nowhere else
    run.py        all of it: the least loaded of several servers, a second try for a job that got lost

Only the standard library is used and nothing of ComfyUI is imported: it works from any machine that reaches a server.
"""

from .convert import convert
from .graph import read_workflow
from .job import JobFailed, JobLost
from .run import Result, run_workflow
from .server import Rejected, Server, Unreachable

__all__ = [
    "JobFailed", "JobLost", "Rejected", "Result", "Server", "Unreachable", "convert", "read_workflow", "run_workflow",
]  # fmt: skip
