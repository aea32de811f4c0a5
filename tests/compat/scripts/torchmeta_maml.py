"""MAML on sinusoids with a learned step size for every tensor, as scripts on torchmeta are written."""

import argparse
import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchmeta
from torchmeta.modules import MetaLinear, MetaModule, MetaSequential
from torchmeta.utils.data import BatchMetaDataLoader
from torchmeta.utils.gradient_based import gradient_update_parameters


class Regressor(MetaModule):
    def __init__(self, hidden=32):
        super().__init__()
        self.features = MetaSequential(
            OrderedDict(
                layer1=MetaSequential(MetaLinear(1, hidden), torch.nn.ReLU()),
                layer2=MetaSequential(MetaLinear(hidden, hidden), torch.nn.ReLU()),
            )
        )
        self.classifier = MetaLinear(hidden, 1)

    def forward(self, inputs, params=None):
        features = self.features(inputs, params=self.get_subdict(params, "features"))
        return self.classifier(features, params=self.get_subdict(params, "classifier"))


class MetaLearner:
    def __init__(self, model, step_size, num_adaptation_steps, fused):
        self.model, self.steps, self.fused = model, num_adaptation_steps, fused
        self.step_size = OrderedDict(
            (name, torch.tensor(step_size, requires_grad=True)) for name, _ in model.meta_named_parameters()
        )
        self.optimizer = torch.optim.Adam([*model.parameters(), *self.step_size.values()], lr=1e-2)

    def adapt(self, inputs, targets):
        params = None
        for _ in range(self.steps):
            inner_loss = F.mse_loss(self.model(inputs, params=params), targets)
            params = gradient_update_parameters(self.model, inner_loss, params=params, step_size=self.step_size)
        return params

    def outer_loss(self, batch):
        if self.fused:  # the one line
            return torchmeta.meta_loss(self.model, batch, step_size=self.step_size, steps=self.steps, loss="mse").mean()
        total = 0.0
        for sx, sy, qx, qy in zip(*batch["train"], *batch["test"], strict=True):
            params = self.adapt(sx, sy)
            total = total + F.mse_loss(self.model(qx, params=params), qy)
        return total / len(batch["train"][0])

    def train(self, loader, num_batches):
        losses = []
        for batch in itertools.islice(loader, num_batches):
            batch = {name: [tensor.float() for tensor in part] for name, part in batch.items()}
            loss = self.outer_loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


parser = argparse.ArgumentParser()
parser.add_argument("--num-batches", type=int, default=100)
parser.add_argument("--fused", action="store_true")
arguments = parser.parse_args()

torch.manual_seed(0)
dataset = torchmeta.toy.helpers.sinusoid(shots=10, test_shots=15, seed=0, num_tasks=10000)
loader = BatchMetaDataLoader(dataset, batch_size=8)
learner = MetaLearner(Regressor(), step_size=0.01, num_adaptation_steps=2, fused=arguments.fused)
losses = learner.train(loader, arguments.num_batches)
print(f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}")
