"""The class names of the ten datasets: all there, in the official order, ready for a prompt."""
import csv
from pathlib import Path

import pytest

import bridgexfer

FILE = Path(bridgexfer.__file__).parent/"class_names.csv"
CLASSES = {"aircraft": 100, "caltech101": 101, "cars": 196, "cub": 200, "dtd": 47, "dogs": 120, "flowers": 102,
           "food": 101, "pets": 37, "sun397": 397}


def rows():
    with FILE.open(newline="", encoding="utf-8") as f: return list(csv.DictReader(f))


def column(dataset, name): return [r[name] for r in rows() if r["dataset"] == dataset]


def names(dataset): return dict(zip(column(dataset, "source"), column(dataset, "name")))


def test_1401_classes_of_ten_datasets():
    assert list(rows()[0]) == ["dataset", "label", "source", "name"]
    assert list(dict.fromkeys(r["dataset"] for r in rows())) == list(CLASSES)
    assert len(rows()) == sum(CLASSES.values()) == 1401
    assert b"\r" not in FILE.read_bytes()


@pytest.mark.parametrize("dataset", CLASSES)
def test_labels_count_up_and_names_are_unique_and_clean(dataset):
    assert column(dataset, "label") == [str(i) for i in range(CLASSES[dataset])]
    source, name = column(dataset, "source"), column(dataset, "name")
    assert len(set(source)) == CLASSES[dataset]
    assert len({n.casefold() for n in name}) == CLASSES[dataset]
    for n in name: assert n and n == " ".join(n.split()) and n.isprintable() and not set(n) & set("_?"), n
    for s in source: assert s and s == s.strip(), s


@pytest.mark.parametrize("dataset", ["aircraft", "caltech101", "dtd", "dogs", "sun397"])
def test_official_order_is_the_sorted_one(dataset):
    source = column(dataset, "source")
    assert source == sorted(source)


def test_capitals_come_first_in_caltech101_and_the_background_is_left_out():
    source = column("caltech101", "source")
    assert source[:6] == ["Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion", "airplanes"]
    assert not [s for s in source if "background" in s.lower()]


def test_food_has_one_pair_out_of_order():
    "classes.txt lists cheesecake first; torchvision sorts the folders, so its labels 16 and 17 are swapped."
    source = column("food", "source")
    assert source[16:18] == ["cheesecake", "cheese_plate"]
    assert source[:16] + source[17:15:-1] + source[18:] == sorted(source)


def test_cub_folders_and_flower_ids_count_from_one():
    assert [s[:4] for s in column("cub", "source")] == [f"{i:03}." for i in range(1, 201)]
    assert column("flowers", "source") == [str(i) for i in range(1, 103)]


def test_pets_are_sorted_whatever_the_case_and_cats_are_written_with_a_capital():
    source = column("pets", "source")
    assert source == sorted(source, key=str.lower)
    assert [s for s in source if s[0].isupper()] == [
        "Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian",
        "Ragdoll", "Russian_Blue", "Siamese", "Sphynx"]


def test_cars_are_grouped_by_make_and_end_with_their_year():
    source = column("cars", "source")
    assert all(s[-5] == " " and 1990 < int(s[-4:]) <= 2012 for s in source)
    makes = [s.split()[0] for s in source]
    assert list(dict.fromkeys(makes)) == sorted(set(makes)) and makes == sorted(makes)
    assert source != sorted(source) # within a make, the archive has an order of its own


def test_dogs_have_a_wordnet_id_and_lack_the_dalmatian():
    source = column("dogs", "source")
    assert all(s[0] == "n" and s[1:9].isdigit() and s[9] == "-" for s in source)
    assert not [s for s in source if s.startswith("n02110341")] # ImageNet's one dog breed that Stanford Dogs leaves out
    assert all(not any(c.isdigit() for c in n) for n in column("dogs", "name"))


def test_indoor_and_outdoor_come_before_the_scene():
    for source, name in names("sun397").items():
        assert source[0] == source[2] == "/" and source[1] == source[3]
        if source.endswith(("/indoor", "/outdoor")): assert name.startswith(source.rsplit("/", 1)[1] + " ")
    kinds = [s.rsplit("/", 1)[0] for s in names("sun397") if s.endswith("/indoor")]
    assert len(kinds) > 40 and {"/c/church", "/c/cathedral", "/s/swimming_pool"} <= set(kinds)


def test_flowers_are_those_of_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    if not hasattr(datasets.Flowers102, "classes"): pytest.skip("this torchvision does not list the flowers")
    corrected = {"barbeton daisy": "barberton daisy", "pink-yellow dahlia?": "pink-yellow dahlia"}
    expected = [corrected.get(c, c) for c in datasets.Flowers102.classes]
    assert [n.casefold() for n in column("flowers", "name")] == expected


# Known from the datasets' papers and documents and from ImageNet's list: (dataset, label, source, name).
ANCHORS = [
    ("aircraft", 0, "707-320", "707-320"),
    ("aircraft", 72, "F-16A/B", "F-16A/B"),
    ("aircraft", 73, "F/A-18", "F/A-18"),
    ("aircraft", 99, "Yak-42", "Yak-42"),
    ("caltech101", 0, "Faces", "off-center face"),
    ("caltech101", 1, "Faces_easy", "centered face"),
    ("caltech101", 100, "yin_yang", "yin and yang symbol"),
    ("cars", 0, "AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
    ("cars", 11, "Audi RS 4 Convertible 2008", "Audi RS 4 Convertible 2008"),
    ("cars", 173, "Ram C/V Cargo Van Minivan 2012", "Ram C/V Cargo Van Minivan 2012"),
    ("cars", 195, "smart fortwo Convertible 2012", "smart fortwo Convertible 2012"),
    ("cub", 0, "001.Black_footed_Albatross", "black-footed albatross"),
    ("cub", 21, "022.Chuck_will_Widow", "chuck-will's-widow"),
    ("cub", 140, "141.Artic_Tern", "Arctic tern"),
    ("cub", 199, "200.Common_Yellowthroat", "common yellowthroat"),
    ("dtd", 0, "banded", "banded"),
    ("dtd", 30, "polka-dotted", "polka-dotted"),
    ("dtd", 46, "zigzagged", "zigzagged"),
    ("dogs", 0, "n02085620-Chihuahua", "Chihuahua"),
    ("dogs", 13, "n02088632-bluetick", "bluetick"),
    ("dogs", 119, "n02116738-African_hunting_dog", "African hunting dog"),
    ("flowers", 0, "1", "pink primrose"),
    ("flowers", 9, "10", "globe thistle"),
    ("flowers", 72, "73", "water lily"),
    ("flowers", 101, "102", "blackberry lily"),
    ("food", 0, "apple_pie", "apple pie"),
    ("food", 27, "creme_brulee", "creme brulee"),
    ("food", 100, "waffles", "waffles"),
    ("pets", 0, "Abyssinian", "Abyssinian"),
    ("pets", 1, "american_bulldog", "American bulldog"),
    ("pets", 36, "yorkshire_terrier", "Yorkshire terrier"),
    ("sun397", 0, "/a/abbey", "abbey"),
    ("sun397", 19, "/a/athletic_field/outdoor", "outdoor athletic field"),
    ("sun397", 84, "/c/cathedral/indoor", "indoor cathedral"),
    ("sun397", 396, "/y/youth_hostel", "youth hostel"),
]


@pytest.mark.parametrize("dataset, label, source, name", ANCHORS)
def test_known_classes_have_their_labels(dataset, label, source, name):
    assert (column(dataset, "source")[label], column(dataset, "name")[label]) == (source, name)
