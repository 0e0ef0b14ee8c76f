"""`crayon demo`: ten examples change a device, and never leave it; what it cannot answer it asks a server LLM.

story       what happens, in order: starts the others, and writes the report
oracle      a process beside it, which trains what ten examples are compared with
program     a process beside it, which exports the base once more, for ExecuTorch
service     `crayon serve` with a server LLM, a process
wire        a relay between service and device, which writes down every byte
device      a process without torch, which customizes and answers
customized  a process without torch, which customizes once more, in ExecuTorch
hybrid      how good the answers of device and server LLM are, and the cost-quality curve
backends    a process without torch, which measures the base in one backend
comparison  both backends side by side
processes   how the others are started, and ended
report      what was measured
page        that as HTML
"""
