"""The seeded faults still match the code. (`catch.py` takes some minutes to find out whether tests catch them.)"""

from collections import Counter

from seeded import AREAS, ROOT, found, sources


def test_every_fault_replaces_one_piece_of_the_code():
    texts = sources()
    faults = [fault for area in AREAS for fault in area.faults]
    places = {fault.name: found(fault, texts) for fault in faults}
    assert {name: where for name, where in places.items() if len(where) != 1} == {}
    assert [name for name, n in Counter(fault.name for fault in faults).items() if n > 1] == []
    assert len(faults) >= 30
    for fault in faults:
        (path,) = places[fault.name]
        compile(texts[path].replace(fault.old, fault.new), str(path), "exec")


def test_the_nearest_tests_of_every_area_exist():
    assert [test for area in AREAS for test in area.tests if not (ROOT / test).exists()] == []
