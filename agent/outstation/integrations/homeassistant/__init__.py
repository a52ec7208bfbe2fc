"""Bridge: what other systems read of devices, made of verified messages; shared by collector and device."""
