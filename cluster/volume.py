"""Attach an EBS volume to this instance and mount it; it is formatted only where it is blank.

python cluster/volume.py vol-0123456789abcdef0 /mlflow
"""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

METADATA = "http://169.254.169.254/latest"
DEVICE = "/dev/sdf"
WAIT_S = 300


def main(volume: str, folder: str) -> None:
    """Do nothing where `folder` is mounted already."""
    if "YOUR-" in volume:
        sys.exit(f"error: {volume} is a placeholder; edit line [4] of cluster.yaml")
    if os.path.ismount(folder):
        return
    import boto3

    client = boto3.client("ec2", region_name=about_this_instance("placement/region"))
    attach(client, volume, about_this_instance("instance-id"))
    # NVMe devices are numbered in the order of their coming; this name is the volume's own.
    mount(Path("/dev/disk/by-id") / f"nvme-Amazon_Elastic_Block_Store_{volume.replace('-', '')}", folder)


def attach(client: Any, volume: str, instance: str) -> None:
    """Attach the volume where it is not yet; an earlier head that goes is waited for. Exits with what to do."""
    deadline = time.monotonic() + WAIT_S
    while True:
        (found,) = client.describe_volumes(VolumeIds=[volume])["Volumes"]
        if any(item["InstanceId"] == instance for item in found["Attachments"]):
            return
        if found["State"] == "available":
            break
        if time.monotonic() > deadline:
            holders = ", ".join(item["InstanceId"] for item in found["Attachments"])
            sys.exit(
                f"error: {volume} is held by {holders}; terminate that instance, or detach the volume from it."
            )
        time.sleep(5)
    (place,) = client.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"]
    zone = place["Placement"]["AvailabilityZone"]
    if zone != found["AvailabilityZone"]:
        sys.exit(
            f"error: {volume} is in {found['AvailabilityZone']}, the head in {zone}; put the volume's zone first."
        )
    client.attach_volume(VolumeId=volume, InstanceId=instance, Device=DEVICE)


def mount(device: Path, folder: str) -> None:
    """Mount the device for this user, with a file system made where it has none."""
    deadline = time.monotonic() + WAIT_S
    while not device.exists():
        if time.monotonic() > deadline:
            sys.exit(f"error: {device} did not appear within {WAIT_S} s.")
        time.sleep(1)
    subprocess.run(["sudo", "mkdir", "-p", folder], check=True)
    mounting = ["sudo", "mount", str(device), folder]
    if subprocess.run(mounting, check=False).returncode != 0:
        # blkid ends with 2 where nothing is on the device: only there is it formatted.
        if subprocess.run(["sudo", "blkid", "-p", str(device)], check=False).returncode != 2:
            sys.exit(f"error: {device} cannot be mounted, and is not blank; look at it before you use it.")
        subprocess.run(["sudo", "mkfs.ext4", "-q", str(device)], check=True)
        subprocess.run(mounting, check=True)
    subprocess.run(["sudo", "chown", f"{os.getuid()}:{os.getgid()}", folder], check=True)


def about_this_instance(what: str) -> str:
    """One word of the instance's metadata (IMDSv2)."""
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _fetch(urllib.request.Request(f"{METADATA}/api/token", method="PUT", headers=seconds))
    shown = {"X-aws-ec2-metadata-token": token}
    return _fetch(urllib.request.Request(f"{METADATA}/meta-data/{what}", headers=shown))


def _fetch(request: urllib.request.Request) -> str:
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read(), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
