package crayon.app

import android.content.pm.ActivityInfo
import android.content.pm.ApplicationInfo
import android.content.pm.PackageManager
import android.content.pm.ServiceInfo
import crayon.app.benchmark.HeadlessBenchmarkActivity
import crayon.app.chat.ChatActivity
import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class ManifestTest : AppTest() {
    private val info
        get() = app.packageManager.getPackageInfo(
            app.packageName,
            PackageManager.GET_PERMISSIONS or PackageManager.GET_ACTIVITIES or PackageManager.GET_SERVICES,
        )

    @Test
    fun `it asks for no permission of the storage, and for none but these`() {
        val asked = checkNotNull(info.requestedPermissions).map { it.substringAfterLast('.') }
        val wanted = setOf(
            "INTERNET",
            "FOREGROUND_SERVICE",
            "FOREGROUND_SERVICE_DATA_SYNC",
            "FOREGROUND_SERVICE_SPECIAL_USE",
            "POST_NOTIFICATIONS",
            "SET_ALARM",
        )
        assertEquals(wanted, asked.toSet())
    }

    @Test
    fun `others can start the chat, and adb the headless benchmark`() {
        val exported = checkNotNull(info.activities).filter { it.exported }.associate { it.name to it.permission }
        val wanted = mapOf(ChatActivity::class.java.name to null, HeadlessBenchmarkActivity::class.java.name to "android.permission.DUMP")
        assertEquals<Map<String, String?>>(wanted, exported)
    }

    @Test
    fun `the service is of the kinds that it says it is`() {
        val service = checkNotNull(info.services).single()
        val both = ServiceInfo.FOREGROUND_SERVICE_TYPE_DATA_SYNC or ServiceInfo.FOREGROUND_SERVICE_TYPE_SPECIAL_USE
        assertEquals(both, service.foregroundServiceType)
        assertTrue(!service.exported)
    }

    @Test
    fun `nothing is backed up, and screens turn`() {
        val application = checkNotNull(info.applicationInfo)
        assertEquals(0, application.flags and ApplicationInfo.FLAG_ALLOW_BACKUP)
        assertEquals(35, application.targetSdkVersion)
        assertEquals(26, application.minSdkVersion)
        val turning = ActivityInfo.SCREEN_ORIENTATION_UNSPECIFIED
        assertTrue(checkNotNull(info.activities).all { it.screenOrientation == turning })
    }
}
