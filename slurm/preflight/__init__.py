"""Looks at nodes, devices, network, disks and data before the first step; `examine.preflight` is the way in."""
