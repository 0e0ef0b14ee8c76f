"""Hybrid inference: the device answers what it can, the server LLM the rest.

prompt ──> the device's answer ──> signals ──> policy ──> route "device": that answer
           (tap and log-probabilities                     route "server": rules ──> log ──> the server LLM
            come with it, no extra pass)                                   (the query's text alone; if it fails, the device's answer)

from crayon_runtime import Engine
from crayon_runtime.routing import Router, ServerLLM

with Engine.load("bundle") as engine, ServerLLM("https://llm.example", api_key=key) as server:
    engine.set_adapter("bundle.customized/adapter")
    engine.router = Router(engine, server=server)
    answer = engine.answer("wake me at six")
    print(answer.route, answer.text)
"""

from crayon_runtime.routing.policies import Policy
from crayon_runtime.routing.router import Answer, AnswerStream, Part, Router
from crayon_runtime.routing.rules import Rules
from crayon_runtime.routing.sent import SentLog, sent_log_path
from crayon_runtime.routing.server import ServerLLM

__all__ = ["Answer", "AnswerStream", "Part", "Policy", "Router", "Rules", "SentLog", "ServerLLM", "sent_log_path"]
