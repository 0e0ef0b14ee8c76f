plugins {
    alias(libs.plugins.kotlin.jvm)
    alias(libs.plugins.kotlin.serialization)
}

kotlin {
    jvmToolchain(17)
    compilerOptions {
        optIn.add("kotlinx.serialization.ExperimentalSerializationApi")
    }
}

dependencies {
    api(libs.coroutines.core)
    api(libs.serialization.json)
    compileOnly(libs.onnxruntime.jvm) // the app has the same classes for Android
    implementation(libs.bouncycastle)
}
