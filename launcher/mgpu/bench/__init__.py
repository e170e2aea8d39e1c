"""`mgpu bench MODEL`: how fast this rig really is, placement by placement, kept in its profile."""
