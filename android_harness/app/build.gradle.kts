plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
    alias(libs.plugins.kotlin.serialization)
}

android {
    namespace = "crayon.app"
    compileSdk = 35

    defaultConfig {
        applicationId = "crayon.app"
        minSdk = 26
        targetSdk = 35
        versionCode = 1
        versionName = "0.1.0"
        ndk {
            abiFilters += listOf("arm64-v8a", "x86_64")
        }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    // It is no module of its own here: an AAR's classes are for Android modules only.
    sourceSets.getByName("main").kotlin.srcDir("../executorch/src/main/kotlin")

    packaging {
        jniLibs {
            // Libraries are mapped from the APK, where this plugin aligns them to pages of 16 KB.
            useLegacyPackaging = false
        }
        resources {
            excludes += "META-INF/versions/9/OSGI-INF/MANIFEST.MF"
        }
    }
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    implementation(project(":core"))
    implementation(libs.coroutines.android)
    implementation(libs.onnxruntime.android)
    implementation(libs.executorch.android)
}
