"""Conversions to and from other libraries; each module needs its library only when it is used."""
