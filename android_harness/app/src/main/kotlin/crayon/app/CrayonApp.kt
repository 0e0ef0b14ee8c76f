package crayon.app

import android.app.Application
import android.content.ComponentCallbacks2
import android.content.Context

/** The process: it holds the [Parts], and gives memory back when the system asks for it. */
open class CrayonApp : Application() {
    val parts by lazy { makeParts() }

    /** For tests, and for apps that want other parts. */
    protected open fun makeParts() = Parts(this)

    override fun onCreate() {
        super.onCreate()
        parts.start()
    }

    @Suppress("DEPRECATION") // before API 34 more levels than two are sent
    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND || level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL) {
            parts.putAway()
        }
    }

    @Deprecated("Deprecated in Java")
    override fun onLowMemory() {
        @Suppress("DEPRECATION")
        super.onLowMemory()
        parts.putAway()
    }
}

val Context.parts: Parts get() = (applicationContext as CrayonApp).parts
