"""What bench.gpu_check measures on a GPU, a file for each question. Their modules import torch, triton and this repository's
engine, and nothing of the servers: no gRPC, no ZeroMQ.
"""
