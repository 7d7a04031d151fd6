"""Loading: crops are torchvision's, fast ways give what plain ways give, and large sets are mapped and not held."""
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
from bridgexfer.data.registry import load_dataset
from bridgexfer.datasets import Augment, GLYPHS, few_shot
from bridgexfer.evaluation import accuracy, predict
from bridgexfer.finetune import FinetuneSpec, finetune
from bridgexfer.generation import synthesis_spec
from bridgexfer.images import Images, Parts, as_images, file_array, open_file, store
from bridgexfer.loading import InputConfig, crop, cropped, eval_batches, normalise, prefetch
from bridgexfer.loading import random_boxes, to_device, to_float, train_batches
from bridgexfer.synthetic_sets import SyntheticSet, bind, image_file, shard_path, shard_table, write_shard
from bridgexfer.transfer import join
from warm import spent, start_code

SETTINGS = [Augment(), GLYPHS, Augment(scale=(0.5, 1), ratio=(0.5, 2)), Augment(scale=(0.9, 1), ratio=(0.4, 2.5)),
            Augment(scale=(0.2, 0.21), ratio=(1, 1))]
BOX = dict(area=lambda v: v[:, 2] * v[:, 3], ratio=lambda v: v[:, 2] / v[:, 3],
           x=lambda v: v[:, 0], y=lambda v: v[:, 1], width=lambda v: v[:, 2], height=lambda v: v[:, 3])


def label(augment): return f"{augment.scale} {augment.ratio}"


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def theirs(augment, n):
    "torchvision's boxes, as shares of a square that is large enough for whole pixels not to matter."
    size = 100_000
    blank = torch.empty(1, 1, 1).expand(1, size, size)
    scale = list(augment.scale)
    ratio = list(augment.ratio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = [RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(n)]
    i, j, h, w = torch.tensor(drawn).double().T / size
    return torch.stack([j + w / 2, i + h / 2, w, h], 1)


@pytest.mark.parametrize("augment", SETTINGS, ids=label)
def test_boxes_are_distributed_as_torchvisions(augment):
    a = random_boxes(3000, augment, seeded()).double()
    b = theirs(augment, 3000)
    for name, f in BOX.items():
        ours, other = (np.round(f(v).numpy(), 4) for v in (a, b)) # equal values, such as whole images, stay equal
        assert ks_2samp(ours, other).pvalue > 1e-3, name


def test_the_comparison_would_notice_another_rule():
    "Uniform ratios in the place of uniform logarithms, and one box for all, are told apart."
    b = theirs(SETTINGS[2], 3000)
    ratio = 0.5 + 1.5 * torch.rand(3000, generator=seeded())
    assert ks_2samp(ratio.numpy(), (b[:, 2] / b[:, 3]).numpy()).pvalue < 1e-3
    assert ks_2samp(np.full(3000, 0.5), b[:, 0].numpy()).pvalue < 1e-3


@pytest.mark.parametrize("size", [32, 64])
def test_batches_are_crops_of_rows_in_order(size):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    images = as_images(pixels, np.arange(20) % 3, "abc")
    mean, std = (0.4,) * 3, (0.2,) * 3
    x, y = next(train_batches(images, 8, InputConfig(size, mean, std), Augment(), seeded(7)))
    rng = seeded(7)
    order = torch.randperm(20, generator=rng).tensor_split(3)[0]
    boxes = random_boxes(7, Augment(), rng)
    flip = torch.rand(7, generator=rng) < 0.5
    plain = crop(to_float(pixels[order.numpy()]), boxes, flip, size)
    assert torch.allclose(x, normalise(plain, mean, std), atol=1e-6)
    assert y.tolist() == images.labels[order.numpy()].tolist()


def test_one_ahead_and_no_more():
    made, used = [], []
    threads = threading.active_count()
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


def plain_loop(model, images, spec, seed):
    "PIL, torchvision's transforms and the usual loop."
    change = transforms.Compose([transforms.RandomResizedCrop(32, spec.augment.scale, spec.augment.ratio),
                                 transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    model.train()
    opt = torch.optim.SGD(model.parameters(), spec.lr, spec.momentum, weight_decay=spec.weight_decay)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, spec.epochs * 2)
    order = seeded(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        passes = (torch.randperm(len(images), generator=order) for _ in range(spec.epochs))
        for at in (half for order in passes for half in order.tensor_split(2)):
            x = torch.stack([change(Image.fromarray(images.pixels[k])) for k in at.tolist()])
            loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(images.labels[at.numpy()]))
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()


@pytest.mark.slow
def test_accuracy_is_that_of_a_plain_loop():
    "The plain loop reaches what `finetune` reaches, within the spread of seeds."
    data = load_dataset("digits")
    spec = FinetuneSpec(lr=0.03, epochs=15, augment=GLYPHS)
    found = {finetune: [], plain_loop: []}
    for seed in range(4):
        few = few_shot(data.train, 10, seed)
        for train, scores in found.items():
            model = create_backbone("mini_resnet10", 10, seed)
            train(model, few, spec, seed)
            scores.append(accuracy(predict(model, data.test).argmax(1), data.test.labels))
    ours, other = (np.array(v) for v in found.values())
    assert min(ours.min(), other.min()) > 0.6
    assert abs(ours.mean() - other.mean()) < 3 * np.sqrt((ours.var(ddof=1) + other.var(ddof=1)) / 4) + 0.01, found


# ---- files

@pytest.fixture(scope="module")
def photos():
    "Six pictures of three shapes, as files."
    rng = np.random.default_rng(0)
    shapes = [(90, 120), (120, 90), (100, 100)] * 2
    coarse = [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in shapes]
    files = [store(image.resize(shape, Image.BICUBIC), 99, "png") for image, shape in zip(coarse, shapes, strict=True)]
    return as_images(file_array(files), [0, 1, 2] * 2, "abc")


def test_boxes_of_a_wide_image_are_torchvisions():
    blank = torch.empty(1, 1, 1).expand(1, 20_000, 60_000)
    for augment in (SETTINGS[0], SETTINGS[3]):
        boxes = random_boxes(3000, augment, seeded(), 3.).double()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            scale = list(augment.scale)
            ratio = list(augment.ratio)
            drawn = [RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(3000)]
        i, j, h, w = torch.tensor(drawn).double().T
        b = torch.stack([(j + w / 2) / 60_000, (i + h / 2) / 20_000, w / 60_000, h / 20_000], 1)
        for name, f in BOX.items():
            ours, other = (np.round(f(v).numpy(), 3) for v in (boxes, b))
            assert ks_2samp(ours, other).pvalue > 1e-3, name


def test_files_are_cropped_as_torchvision_crops_them(photos):
    [x, y], = train_batches(photos, 6, InputConfig(48, (0.,) * 3, (1.,) * 3), Augment(), seeded(3))
    rng = seeded(3)
    order = torch.randperm(6, generator=rng)
    images = [open_file(photos.pixels[k]) for k in order.tolist()]
    boxes = random_boxes(6, Augment(), rng, torch.tensor([i.width / i.height for i in images]))
    flip = torch.rand(6, generator=rng) < 0.5
    for got, image, box, mirrored in zip(x, images, boxes.tolist(), flip.tolist(), strict=True):
        plain = cropped(image, box, mirrored, 48)
        assert np.abs(got.permute(1, 2, 0).numpy() * 255 - plain).max() < 0.01
    assert y.tolist() == photos.labels[order.numpy()].tolist()
    again = list(train_batches(photos, 6, InputConfig(48, (0.,) * 3, (1.,) * 3), Augment(), seeded(3)))
    assert torch.equal(again[0][0], x)


def test_files_are_evaluated_as_torchvision_does(photos):
    usual = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56), transforms.ToTensor()])
    theirs = torch.stack([usual(open_file(file)) for file in photos.pixels])
    ours = torch.cat(list(eval_batches(photos, 4, InputConfig(56, (0.,) * 3, (1.,) * 3))))
    assert (ours - theirs).abs().max() < 1e-5


def test_joined_files_train_as_if_they_were_one_array(photos):
    whole = list(train_batches(join(photos, photos), 6, InputConfig(32), Augment(), seeded()))
    twice = as_images(np.concatenate([photos.pixels] * 2), np.tile(photos.labels, 2), "abc")
    other = list(train_batches(twice, 6, InputConfig(32), Augment(), seeded()))
    assert join(photos, photos).digest == twice.digest
    assert all(torch.equal(x, z) and torch.equal(y, t) for (x, y), (z, t) in zip(whole, other, strict=True))
    with pytest.raises(ValueError, match="Cannot mix"): join(photos, as_images(noise(2), [0, 1], "abc"))


# ---- where pixels are stored

def noise(n, size=8, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_joined_sets_train_as_if_they_were_copied():
    a = as_images(noise(30, 32), np.arange(30) % 3, "abc")
    b = as_images(noise(50, 32, 1), np.arange(50) % 3, "abc")
    joined = join(a, b)
    copied = as_images(np.concatenate([a.pixels, b.pixels]), np.r_[a.labels, b.labels], "abc")
    assert joined.digest == copied.digest and joined.pixels.parts[0] is a.pixels and joined.pixels.parts[1] is b.pixels
    assert join(joined, a).pixels.parts == [a.pixels, b.pixels, a.pixels]
    ways = [list(train_batches(images, 16, InputConfig(32), Augment(), seeded())) for images in (joined, copied)]
    assert all(torch.equal(x, z) and torch.equal(y, t) for (x, y), (z, t) in zip(*ways, strict=True))
    middle = InputConfig(20)
    assert all(map(torch.equal, eval_batches(joined, 33, middle), eval_batches(copied, 33, middle)))
    assert np.array_equal(joined.take([70, 0, 31]).pixels, copied.pixels[[70, 0, 31]])


def test_parts_of_nothing():
    assert Parts(noise(0)).shape == (0, 8, 8, 3) and Parts(noise(0))[[]].shape == (0, 8, 8, 3)
    with pytest.raises(IndexError, match="Rows 0 to 0 of 0"): Parts(noise(0))[[0]]
    small = as_images(noise(2), [0, 1], "ab")
    with pytest.raises(ValueError, match="Cannot mix"): join(small, as_images(noise(2, 9), [0, 1], "ab"))


def write_noise(folder, spec, shard, n, seed):
    files = [image_file(i, spec) for i in noise(n, 32, seed)]
    write_shard(shard_path(folder, shard), shard_table(spec, shard, files))


@pytest.fixture
def made(tmp_path):
    "A set of three shards whose images are noise: 12 images of each of 10 classes."
    spec = synthesis_spec("miniature", list("abcdefghij"), steps=5, size=32, batch=64, shard=4)
    bind(tmp_path/"set", spec)
    for k in range(3): write_noise(tmp_path/"set", spec, k, 40, seed=k)
    return SyntheticSet(tmp_path/"set")


def kept(made): return sorted((made.folder/"decoded").iterdir())


def test_mapped_images_are_the_images(made):
    for n in (1, 4, 5, 12):
        here = made.images(n)
        there = made.images(n, memory=0)
        assert isinstance(here.pixels, np.ndarray) and isinstance(there.pixels, Parts)
        assert all(isinstance(p, np.memmap) for p in there.pixels.parts)
        assert here.digest == there.digest and here.rows.tolist() == there.rows.tolist()
        assert here.labels.tolist() == there.labels.tolist() == [*range(10)] * n
    assert np.array_equal(here.pixels, np.concatenate([noise(40, 32, k) for k in range(3)]))
    assert len(kept(made)) == 3 and made.verify() == []


def test_each_shard_is_decoded_once(made):
    made.images(4, memory=0)
    [first] = kept(made)
    at = first.stat().st_mtime_ns
    made.images(12, memory=0) # more of the set
    assert kept(made)[0] == first and first.stat().st_mtime_ns == at and len(kept(made)) == 3


def test_a_shard_that_is_made_again_is_decoded_again(made):
    old = made.images(memory=0).pixels
    write_noise(made.folder, made.spec, 1, 40, seed=99)
    new = made.images(memory=0).pixels
    assert np.array_equal(new[40:80], noise(40, 32, 99)) and np.array_equal(new[:40], old[:40]) and len(kept(made)) == 3
    assert np.array_equal(old[40:80], noise(40, 32, 1)) # who had opened the old one still has it


def test_what_a_process_writes_into_mapped_pixels_stays_its_own(made):
    made.images(memory=0).pixels.parts[0][:] = 0
    assert np.array_equal(made.images(4, memory=0).pixels, noise(40, 32, 0))


def test_two_jobs_that_start_together(made, tmp_path, record_property):
    code = ("import sys\nfrom bridgexfer.synthetic_sets import SyntheticSet\n"
            "print(SyntheticSet(sys.argv[1]).images(memory=0).digest)")
    logs = [tmp_path/f"log{k}" for k in range(2)]
    jobs = [start_code(code, str(made.folder), log=log) for log in logs]
    for job in jobs: job.join()
    record_property("elsewhere", spent(*logs))
    assert {log.read_text().strip() for log in logs} == {made.images().digest}
    assert [p.suffix for p in kept(made)] == [".npy"] * 3


def test_a_damaged_shard_leaves_no_pixels(made):
    path = shard_path(made.folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    for memory in (0, 2**30):
        with pytest.raises(ValueError, match="is damaged"): made.images(memory=memory)
    assert len(kept(made)) == 1


def test_a_reduced_set_is_read_at_its_own_size(tmp_path):
    whole = synthesis_spec("miniature", ["a", "b"], steps=5, size=32, batch=4, shard=1)
    spec = replace(whole, stored_size=16, format="jpeg")
    bind(tmp_path/"set", spec)
    write_noise(tmp_path/"set", spec, 0, 2, seed=0)
    images = SyntheticSet(tmp_path/"set").images(memory=0)
    assert isinstance(images, Images) and images.pixels.shape == (2, 16, 16, 3)
    assert images.digest == SyntheticSet(tmp_path/"set").images().digest
