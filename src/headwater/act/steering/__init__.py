"""Steering: change the stream where and as strongly as works on held-out training pairs. One file a method."""

from headwater.act.steering.caa import steer

__all__ = ["steer"]
