"""Stands for NVIDIA's apex on a CPU: the same names, signatures and habits, in plain torch.

After NVIDIA/apex `apex/optimizers/fused_adam.py`, `csrc/multi_tensor_adam.cu` and
`csrc/multi_tensor_apply.cuh`; its code is not here.
"""
