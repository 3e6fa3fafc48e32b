"""Data-parallel training of a small model: each step's gradients go through NCCL's all-reduce.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who meets where, as for any PyTorch job.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main():
    dist.init_process_group("nccl")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    torch.manual_seed(dist.get_rank())
    layers = [torch.nn.Linear(1024, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers).to(device), device_ids=[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(100):
        inputs = torch.randn(64, 1024, device=device)
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    # Every rank has the same parameters, or something was lost on the way.
    total = torch.tensor([sum(p.double().sum() for p in model.parameters())], device=device)
    sums = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, total)
    assert all(torch.equal(one, total) for one in sums), sums
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
