package org.pytorch.executorch;

import java.nio.LongBuffer;

/** As declared in ExecuTorch 1.4; the bodies are in its AAR. */
public abstract class Tensor {
  public static Tensor fromBlob(LongBuffer data, long[] shape) {
    throw new UnsupportedOperationException();
  }

  public float[] getDataAsFloatArray() {
    throw new UnsupportedOperationException();
  }
}
