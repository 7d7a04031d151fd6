"""Loading: crops are torchvision's, fast ways give what plain ways give, and large sets are mapped and not held."""
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop

from bridgexfer.backbones import create_backbone
from bridgexfer.evaluation import predict
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Augment, GLYPHS, few_shot
from bridgexfer.evaluation import accuracy
from bridgexfer.images import Images, Parts, as_images
from bridgexfer.finetune import FinetuneSpec, finetune
from bridgexfer.generation import synthesis_spec
from bridgexfer.loading import GRID_SIZE, crop, cut, eval_batches, normalise, prefetch, random_boxes, to_device
from bridgexfer.loading import to_float, train_batches
from bridgexfer.synthetic_sets import SyntheticSet, claim, image_file, shard_path, shard_table, write_shard
from bridgexfer.transfer import join

SETTINGS = [Augment(), GLYPHS, Augment(scale=(0.5, 1), ratio=(0.5, 2)), Augment(scale=(0.9, 1), ratio=(0.4, 2.5)), Augment(scale=(0.2, 0.21), ratio=(1, 1))]


def theirs(augment, n):
    "torchvision's boxes, as shares of a square that is large enough for whole pixels not to matter."
    size, blank = 100_000, torch.empty(1, 1, 1).expand(1, 100_000, 100_000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        i, j, h, w = torch.tensor([RandomResizedCrop.get_params(blank, list(augment.scale), list(augment.ratio)) for _ in range(n)]).double().T / size
    return torch.stack([j + w / 2, i + h / 2, w, h], 1)


@pytest.mark.parametrize("augment", SETTINGS, ids=lambda a: f"{a.scale} {a.ratio}")
def test_boxes_are_distributed_as_torchvisions(augment):
    n = 3000
    a, b = random_boxes(n, augment, torch.Generator().manual_seed(0)).double(), theirs(augment, n)
    features = dict(area=lambda v: v[:, 2] * v[:, 3], ratio=lambda v: v[:, 2] / v[:, 3], x=lambda v: v[:, 0], y=lambda v: v[:, 1], width=lambda v: v[:, 2], height=lambda v: v[:, 3])
    for name, f in features.items():
        ours, other = (np.round(f(v).numpy(), 4) for v in (a, b)) # equal values, such as whole images, stay equal
        assert ks_2samp(ours, other).pvalue > 1e-3, name


def test_the_comparison_would_notice_another_rule():
    "Uniform ratios in the place of uniform logarithms, and one box for all, are told apart."
    b = theirs(SETTINGS[2], 3000)
    wrong = torch.Generator().manual_seed(0)
    ratio = 0.5 + 1.5 * torch.rand(3000, generator=wrong)
    assert ks_2samp(ratio.numpy(), (b[:, 2] / b[:, 3]).numpy()).pvalue < 1e-3
    assert ks_2samp(np.full(3000, 0.5), b[:, 0].numpy()).pvalue < 1e-3


@pytest.mark.parametrize("augment", [*SETTINGS, Augment(scale=(1, 1), ratio=(1, 1)), Augment(scale=(0.001, 0.002))], ids=lambda a: f"{a.scale} {a.ratio}")
@pytest.mark.parametrize(("h", "w", "size"), [(73, 73, 64), (60, 90, 50), (2, 2, 49), (256, 256, 64)])
def test_cut_is_crop(augment, h, w, size):
    rng = torch.Generator().manual_seed(0)
    pixels, boxes, flip = torch.randint(0, 256, (9, h, w, 3), dtype=torch.uint8, generator=rng), random_boxes(9, augment, rng), torch.arange(9) % 2 == 0
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    plain, fast = normalise(crop(to_float(pixels), boxes, flip, size), mean, std), cut(pixels, boxes, flip, size, mean, std)
    assert fast.shape == plain.shape == (9, 3, size, size) and fast.is_contiguous(memory_format=torch.channels_last)
    assert (plain - fast).abs().max() < 2e-3 # noise has steps of 255 / 0.2 a pixel; a position is right to a millionth of the image
    assert torch.allclose(cut(pixels, boxes, flip, size), crop(to_float(pixels), boxes, flip, size), atol=5e-4)


@pytest.mark.parametrize("size", [GRID_SIZE, GRID_SIZE + 1])
def test_batches_are_the_same_on_both_sides_of_the_switch(size):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    images, stats = as_images(pixels, np.arange(20) % 3, "abc"), ((0.4,) * 3, (0.2,) * 3)
    rng = torch.Generator().manual_seed(7)
    for x, y in train_batches(images, 8, size, Augment(), torch.Generator().manual_seed(7), *stats):
        break
    order = torch.randperm(20, generator=rng).tensor_split(3)[0]
    boxes, flip = random_boxes(7, Augment(), rng), torch.rand(7, generator=rng) < 0.5
    assert torch.allclose(x, normalise(crop(to_float(pixels[order.numpy()]), boxes, flip, size), *stats), atol=2e-3)
    assert y.tolist() == images.labels[order.numpy()].tolist()


def test_one_ahead_and_no_more():
    made, used, threads = [], [], threading.active_count()
    def items():
        for k in range(50):
            made.append(k)
            yield k
    for k in prefetch(items()):
        used.append(k)
        assert len(made) <= len(used) + 1
    assert used == made == list(range(50)) and threading.active_count() == threads


def test_an_error_in_the_thread_reaches_the_caller_and_nothing_hangs():
    def items():
        yield 1
        raise OSError("disk full")
    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk full"): next(stream)
    before = threading.active_count()
    stream = prefetch(iter(range(10**9)))
    assert [next(stream), next(stream)] == [0, 1]
    stream.close() # a consumer that stops early
    assert threading.active_count() == before


def test_staged_batches_are_the_batches():
    "The way to a GPU without the GPU: one prefetch, in the same order, from the same random numbers."
    parts = [(torch.arange(3) + k, torch.ones(2) * k) for k in range(5)]
    for got, want in zip(to_device(prefetch(parts), "cpu"), parts, strict=True): assert all(map(torch.equal, got, want))


@pytest.mark.slow
def test_accuracy_is_that_of_a_plain_loop():
    "PIL, torchvision's transforms and the usual loop reach what `finetune` reaches, within the spread of seeds."
    data, spec, arch = load_dataset("digits"), FinetuneSpec(lr=0.03, epochs=15, augment=GLYPHS), "mini_resnet10"
    change = transforms.Compose([transforms.RandomResizedCrop(32, GLYPHS.scale, GLYPHS.ratio), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def plain(model, images, seed):
        opt, order = torch.optim.SGD(model.train().parameters(), spec.lr, spec.momentum, weight_decay=spec.weight_decay), torch.Generator().manual_seed(seed)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, spec.epochs * 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for at in (a for _ in range(spec.epochs) for a in torch.randperm(len(images), generator=order).tensor_split(2)):
                x = torch.stack([change(Image.fromarray(images.pixels[k])) for k in at.tolist()])
                opt.zero_grad(); torch.nn.functional.cross_entropy(model(x), torch.from_numpy(images.labels[at.numpy()])).backward(); opt.step(); rate.step()

    found = {"ours": [], "plain": []}
    for seed in range(4):
        few = few_shot(data.train, 10, seed)
        for name, scores in found.items():
            model = create_backbone(arch, 10, seed)
            finetune(model, few, spec, arch, seed) if name == "ours" else plain(model, few, seed)
            scores.append(accuracy(predict(model, data.test, arch).argmax(1), data.test.labels))
    ours, other = (np.array(v) for v in found.values())
    assert min(ours.min(), other.min()) > 0.6
    assert abs(ours.mean() - other.mean()) < 3 * np.sqrt((ours.var(ddof=1) + other.var(ddof=1)) / 4) + 0.01, found


# ---- where pixels lie

def noise(n, size=8, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_joined_sets_train_as_if_they_were_copied():
    a, b = as_images(noise(30, 32), np.arange(30) % 3, "abc"), as_images(noise(50, 32, 1), np.arange(50) % 3, "abc")
    joined, copied = join(a, b), as_images(np.concatenate([a.pixels, b.pixels]), np.r_[a.labels, b.labels], "abc")
    assert joined.digest == copied.digest and joined.pixels.parts[0] is a.pixels and joined.pixels.parts[1] is b.pixels
    assert join(joined, a).pixels.parts == [a.pixels, b.pixels, a.pixels]
    ways = [list(train_batches(s, 16, 32, Augment(), torch.Generator().manual_seed(0))) for s in (joined, copied)]
    assert all(torch.equal(x, z) and torch.equal(y, t) for (x, y), (z, t) in zip(*ways, strict=True))
    assert all(map(torch.equal, eval_batches(joined, 33, 20), eval_batches(copied, 33, 20)))
    assert np.array_equal(joined.take([70, 0, 31]).pixels, copied.pixels[[70, 0, 31]])


def test_parts_of_nothing():
    assert Parts(noise(0)).shape == (0, 8, 8, 3) and Parts(noise(0))[[]].shape == (0, 8, 8, 3)
    with pytest.raises(IndexError, match="Rows 0 to 0 of 0"): Parts(noise(0))[[0]]
    with pytest.raises(ValueError, match="Cannot mix"): join(as_images(noise(2), [0, 1], "ab"), as_images(noise(2, 9), [0, 1], "ab"))


@pytest.fixture
def made(tmp_path):
    "A set of three shards whose images are noise: 12 images of each of 10 classes."
    spec = synthesis_spec("miniature", list("abcdefghij"), steps=5, size=32, batch=64, shard=4)
    claim(tmp_path/"set", spec)
    for k in range(3): write_shard(shard_path(tmp_path/"set", k), shard_table(spec, k, [image_file(i, spec) for i in noise(40, 32, k)]))
    return SyntheticSet(tmp_path/"set")


def kept(made): return sorted((made.folder/"decoded").iterdir())


def test_mapped_images_are_the_images(made):
    for n in (1, 4, 5, 12):
        here, there = made.images(n), made.images(n, memory=0)
        assert isinstance(here.pixels, np.ndarray) and isinstance(there.pixels, Parts) and all(isinstance(p, np.memmap) for p in there.pixels.parts)
        assert here.digest == there.digest and here.labels.tolist() == there.labels.tolist() == [*range(10)] * n and here.rows.tolist() == there.rows.tolist()
    assert np.array_equal(here.pixels, np.concatenate([noise(40, 32, k) for k in range(3)]))
    assert len(kept(made)) == 3 and made.verify() == []


def test_each_shard_is_decoded_once(made):
    made.images(4, memory=0)
    [first], at = kept(made), kept(made)[0].stat().st_mtime_ns
    made.images(12, memory=0) # more of the set
    assert kept(made)[0] == first and first.stat().st_mtime_ns == at and len(kept(made)) == 3


def test_a_shard_that_is_made_again_is_decoded_again(made):
    old = made.images(memory=0).pixels
    other = shard_table(made.spec, 1, [image_file(i, made.spec) for i in noise(40, 32, 99)])
    write_shard(shard_path(made.folder, 1), other)
    new = made.images(memory=0).pixels
    assert np.array_equal(new[40:80], noise(40, 32, 99)) and np.array_equal(new[:40], old[:40]) and len(kept(made)) == 3
    assert np.array_equal(old[40:80], noise(40, 32, 1)) # who had opened the old one still has it


def test_what_a_process_writes_into_mapped_pixels_stays_its_own(made):
    made.images(memory=0).pixels.parts[0][:] = 0
    assert np.array_equal(made.images(4, memory=0).pixels, noise(40, 32, 0))


def test_two_jobs_that_start_together(made):
    code = "import sys; from bridgexfer.synthetic_sets import SyntheticSet; print(SyntheticSet(sys.argv[1]).images(memory=0).digest)"
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(made.folder)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {job.communicate()[0].strip() for job in jobs} == {made.images().digest} and [p.suffix for p in kept(made)] == [".npy"] * 3


def test_a_damaged_shard_leaves_no_pixels(made):
    path = shard_path(made.folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    for memory in (0, 2**30):
        with pytest.raises(ValueError, match="is damaged"): made.images(memory=memory)
    assert len(kept(made)) == 1


def test_a_reduced_set_is_read_at_its_own_side(tmp_path):
    spec = replace(synthesis_spec("miniature", ["a", "b"], steps=5, size=32, batch=4, shard=1), stored_size=16, format="jpeg")
    claim(tmp_path/"set", spec)
    write_shard(shard_path(tmp_path/"set", 0), shard_table(spec, 0, [image_file(i, spec) for i in noise(2, 32)]))
    images = SyntheticSet(tmp_path/"set").images(memory=0)
    assert isinstance(images, Images) and images.pixels.shape == (2, 16, 16, 3) and images.digest == SyntheticSet(tmp_path/"set").images().digest
