"""The product tried on itself: what people, disks and strangers do to it, each case in a process of its own."""
