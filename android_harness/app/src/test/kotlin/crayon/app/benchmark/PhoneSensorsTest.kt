package crayon.app.benchmark

import android.content.Intent
import android.os.BatteryManager
import android.os.PowerManager
import crayon.app.AppTest
import org.junit.Test
import org.robolectric.Shadows.shadowOf
import kotlin.test.assertEquals
import kotlin.test.assertFalse

class PhoneSensorsTest : AppTest() {
    private val sensors by lazy { PhoneSensors(app) }
    private val batteries get() = shadowOf(app.getSystemService(BatteryManager::class.java))

    @Suppress("DEPRECATION") // it is how the system tells it
    private fun battery(temperature: Int, millivolts: Int) {
        val state = Intent(Intent.ACTION_BATTERY_CHANGED)
        state.putExtra(BatteryManager.EXTRA_TEMPERATURE, temperature).putExtra(BatteryManager.EXTRA_VOLTAGE, millivolts)
        app.sendStickyBroadcast(state)
    }

    @Test
    fun `the battery tells its temperature, and while it is discharging its power`() {
        battery(312, 3800)
        batteries.setIntProperty(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW, -250_000)
        batteries.setIsCharging(false)
        assertEquals(31.2, sensors.temperature().getValue("battery"), 1e-9)
        assertEquals(0.95, sensors.power().getValue("battery"), 1e-9)
        batteries.setIsCharging(true)
        assertFalse("battery" in sensors.power())
    }

    @Test
    fun `the thermal status is what changes when the phone slows down`() {
        shadowOf(app.getSystemService(PowerManager::class.java)).setCurrentThermalStatus(PowerManager.THERMAL_STATUS_SEVERE)
        assertEquals(PowerManager.THERMAL_STATUS_SEVERE.toLong(), sensors.throttled().getValue("thermal status"))
        assertFalse(sensors.absent().any { it.what == "throttling" })
    }
}
