"""Ray Train's datasets and the Ray tasks of `sdan train` give every worker the same crops."""

from concurrent.futures import ThreadPoolExecutor

import feeding
import pytest
import ray
import torch

from pipelines.loader import CropStream, index_split, training_batches


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dataset_gives_the_crops_of_the_ray_tasks(tiny_shards):
    """For two workers that resume at crop 5, while all CPUs are reserved, as by train workers."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(feeding)  # Ray's workers cannot import it

    @ray.remote
    class Reservation:
        def is_ready(self):
            return True

    holder = Reservation.options(num_cpus=2).remote()
    assert ray.get(holder.is_ready.remote())
    stream = CropStream(index_split(str(tiny_shards), "train"), seed=3, crop_px=16, augment=True)
    position = ray.remote(num_cpus=0)(feeding.Position).remote()
    ray.get(position.set.remote(5, 2))
    dataset = feeding.crop_dataset(stream, position, batch=4, crops=256, readers=1, workers=2)
    dataset.context.execution_options.preserve_order = True

    def steps(shard):
        return [batch for batch, _ in zip(shard.iter_torch_batches(batch_size=4), range(20), strict=False)]

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(steps, dataset.streaming_split(2, equal=True)))
    for rank, batches in enumerate(ranks):
        expected = training_batches(stream, batch=4, rank=rank, world=2, first_crop=5, last_crop=165)
        for got, batch in zip(batches, expected, strict=True):
            assert all(torch.equal(got[name], batch[name]) for name in batch)
