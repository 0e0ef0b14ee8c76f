package org.pytorch.executorch;

/** As declared in ExecuTorch 1.4; the bodies are in its AAR. */
public class Module {
  public static final int LOAD_MODE_FILE = 0;
  public static final int LOAD_MODE_MMAP = 1;

  public static Module load(String modelPath, int loadMode, int numThreads) {
    throw new UnsupportedOperationException();
  }

  public EValue[] execute(String methodName, EValue... inputs) {
    throw new UnsupportedOperationException();
  }

  public String[] getMethods() {
    throw new UnsupportedOperationException();
  }

  public void destroy() {
    throw new UnsupportedOperationException();
  }
}
