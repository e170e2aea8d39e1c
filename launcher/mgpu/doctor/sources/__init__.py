"""Where the doctor's facts come from: drivers, /sys and /proc below a root, this process, the runtimes."""
