package org.pytorch.executorch;

/** As declared in ExecuTorch 1.4; the bodies are in its AAR. */
public class EValue {
  public static EValue from(Tensor tensor) {
    throw new UnsupportedOperationException();
  }

  public Tensor toTensor() {
    throw new UnsupportedOperationException();
  }

  public long toInt() {
    throw new UnsupportedOperationException();
  }
}
