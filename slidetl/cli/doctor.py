"""``slidetl doctor``."""

from __future__ import annotations

from pathlib import Path


def doctor(folders: tuple[Path, ...] = (), *, json: bool = False) -> int:
    """Examines the installation and the machine: versions, readers, GPU, memory, weights, file systems.

    The page suits a bug report: it has no names of users or hosts, and no paths but the folders given. Exit
    code 1 if something would fail.

    Args:
        folders: folders for caches or results, to examine their file systems; each gets a hidden folder that
            is removed again.
        json: print one JSON object on stdout, instead of a page.
    """
    import dataclasses
    from json import dumps

    from slidetl.doctor import examine

    checks = examine(folders)
    fails = [check for check in checks if check.state == "fails"]
    if json:
        print(
            dumps({"checks": [dataclasses.asdict(check) for check in checks], "fails": len(fails)}, indent=2)
        )
        return 1 if fails else 0
    width = max(len(check.name) for check in checks)
    for number, check in enumerate(checks):
        if not number or check.topic != checks[number - 1].topic:
            print(f"{'' if not number else chr(10)}{check.topic}")
        print(f"  {check.name:<{width}}  {check.value}")
    slow = [check for check in checks if check.state == "slow"]
    for title, found in (("will be slow", slow), ("will fail", fails)):
        if found:
            print(f"\n{title}")
            for check in found:
                print(f"  {check.topic}, {check.name}: {check.advice}")
    if not fails:
        print("\nnothing found that would fail")
    return 1 if fails else 0
